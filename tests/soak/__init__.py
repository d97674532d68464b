"""Kills trainings at random moments and resumes them until done; what comes out must equal an uninterrupted run."""
