"""Functions that the conversion copies, as they stand here, into the code of NorBERT."""


def rebuilt_after_load(module_class):
    """Class decorator: tables that are not saved with the weights are computed again once the weights are loaded."""
    build = module_class.__init__

    def __init__(self, *arguments, **options) -> None:
        build(self, *arguments, **options)
        self.built_from = arguments, options

    def rebuild_tables(self) -> None:
        arguments, options = self.built_from
        fresh = dict(type(self)(*arguments, **options).named_buffers(recurse=False))
        for name, table in self.named_buffers(recurse=False):
            table.copy_(fresh[name])

    module_class.__init__, module_class.rebuild_tables = __init__, rebuild_tables
    return module_class


def packed(kwargs):
    """Where each of the texts starts that lie one after the other without padding; None for padded texts."""
    names = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    return {name: kwargs[name] for name in names} if "cu_seq_lens_q" in kwargs else None


def places_of(padding_info, length):
    """Which rows of a table of positions the tokens have."""
    return padding_info["position_ids"][0] if isinstance(padding_info, dict) else slice(length)
