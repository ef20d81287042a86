"""Warnings of the stack that several test files pass over, as `pytest.mark.filterwarnings` takes them."""

LIGHTNING = (  # lightning 2.6 asks torch's pytree by its old name, and advises on how to load data
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
    "ignore:The .train_dataloader. does not have many workers",
)
