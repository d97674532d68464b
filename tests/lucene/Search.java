import java.io.BufferedReader;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Base64;
import org.apache.lucene.analysis.Analyzer;
import org.apache.lucene.analysis.Tokenizer;
import org.apache.lucene.analysis.core.WhitespaceTokenizer;
import org.apache.lucene.analysis.miscellaneous.DelimitedTermFrequencyTokenFilter;
import org.apache.lucene.document.Document;
import org.apache.lucene.document.FeatureField;
import org.apache.lucene.document.Field;
import org.apache.lucene.document.FieldType;
import org.apache.lucene.document.StringField;
import org.apache.lucene.index.DirectoryReader;
import org.apache.lucene.index.FieldInvertState;
import org.apache.lucene.index.IndexOptions;
import org.apache.lucene.index.IndexWriter;
import org.apache.lucene.index.IndexWriterConfig;
import org.apache.lucene.index.Term;
import org.apache.lucene.search.BooleanClause;
import org.apache.lucene.search.BooleanQuery;
import org.apache.lucene.search.BoostQuery;
import org.apache.lucene.search.CollectionStatistics;
import org.apache.lucene.search.IndexSearcher;
import org.apache.lucene.search.Query;
import org.apache.lucene.search.ScoreDoc;
import org.apache.lucene.search.TermQuery;
import org.apache.lucene.search.TermStatistics;
import org.apache.lucene.search.similarities.Similarity;
import org.apache.lucene.store.ByteBuffersDirectory;

/**
 * Indexes documents and searches them with Lucene itself: java Search.java impact|feature DOCUMENTS QUERIES HITS.
 *
 * <p>A line of either file is an id and, after tabs, term and weight in turn, terms in base64. With `impact` a weight is a
 * whole number, stored as the term's frequency, as an index of repeated words has it; the score is the sum of products.
 * With `feature` it is a FeatureField, as rank_features and sparse_vector fields are. Prints id and score of the hits, the
 * best first, a line per query.
 */
public class Search {
  static final String FIELD = "v";
  static final char BETWEEN = '\ue000';

  /** Term frequency times the query's weight. */
  static class Impact extends Similarity {
    @Override
    public long computeNorm(FieldInvertState state) {
      return 1;
    }

    @Override
    public SimScorer scorer(float boost, CollectionStatistics collection, TermStatistics... terms) {
      return new SimScorer() {
        @Override
        public float score(float frequency, long norm) {
          return boost * frequency;
        }
      };
    }
  }

  static String term(String encoded) {
    return new String(Base64.getDecoder().decode(encoded), StandardCharsets.UTF_8);
  }

  static Document document(String[] parts, boolean impact) {
    Document document = new Document();
    document.add(new StringField("id", parts[0], Field.Store.YES));
    StringBuilder words = new StringBuilder();
    for (int i = 1; i < parts.length; i += 2) {
      if (impact) {
        words.append(term(parts[i])).append(BETWEEN).append(parts[i + 1]).append(' ');
      } else {
        document.add(new FeatureField(FIELD, term(parts[i]), Float.parseFloat(parts[i + 1])));
      }
    }
    if (impact) {
      FieldType type = new FieldType();
      type.setIndexOptions(IndexOptions.DOCS_AND_FREQS);
      type.setOmitNorms(true);
      document.add(new Field(FIELD, words.toString(), type));
    }
    return document;
  }

  static Query query(String[] parts, boolean impact) {
    BooleanQuery.Builder builder = new BooleanQuery.Builder();
    for (int i = 1; i < parts.length; i += 2) {
      float weight = Float.parseFloat(parts[i + 1]);
      String term = term(parts[i]);
      Query one = impact
          ? new BoostQuery(new TermQuery(new Term(FIELD, term)), weight)
          : FeatureField.newLinearQuery(FIELD, term, weight);
      builder.add(one, BooleanClause.Occur.SHOULD);
    }
    return builder.build();
  }

  public static void main(String[] arguments) throws Exception {
    boolean impact = arguments[0].equals("impact");
    Analyzer analyzer = new Analyzer() {
      @Override
      protected TokenStreamComponents createComponents(String field) {
        Tokenizer words = new WhitespaceTokenizer();
        return new TokenStreamComponents(words, new DelimitedTermFrequencyTokenFilter(words, BETWEEN));
      }
    };
    BooleanQuery.setMaxClauseCount(100_000);
    ByteBuffersDirectory directory = new ByteBuffersDirectory();
    try (IndexWriter writer = new IndexWriter(directory, new IndexWriterConfig(analyzer).setSimilarity(new Impact()));
        BufferedReader lines = Files.newBufferedReader(Path.of(arguments[1]))) {
      for (String line = lines.readLine(); line != null; line = lines.readLine()) {
        writer.addDocument(document(line.split("\t"), impact));
      }
      writer.forceMerge(1);
    }
    IndexSearcher searcher = new IndexSearcher(DirectoryReader.open(directory));
    if (impact) {
      searcher.setSimilarity(new Impact());
    }
    try (BufferedReader lines = Files.newBufferedReader(Path.of(arguments[2]))) {
      for (String line = lines.readLine(); line != null; line = lines.readLine()) {
        StringBuilder out = new StringBuilder();
        for (ScoreDoc hit : searcher.search(query(line.split("\t"), impact), Integer.parseInt(arguments[3])).scoreDocs) {
          out.append(searcher.doc(hit.doc).get("id")).append('\t').append(hit.score).append('\t');
        }
        System.out.println(out.toString().trim());
      }
    }
  }
}
