"""Where in the corpora a sample lies: for the report of a batch that went wrong."""

from typing import Any


def locate(dataset: Any, index: int) -> dict[str, Any]:
    """Corpus, epoch, documents and token offset of sample `index` of `datasets.build_datasets`.

    `offset` counts tokens from the start of `first_document`; the sample ends in `last_document`. Document
    numbers are those of the corpus's `.idx`.
    """
    if hasattr(dataset, "dataset_index"):  # a blend
        part = dataset.datasets[int(dataset.dataset_index[index])]
        return locate(part, int(dataset.dataset_sample_index[index]))
    epoch, sample = divmod(int(index), dataset.per_epoch)
    shuffled = dataset.epochs[epoch]
    if shuffled.shuffle_index is None:
        shuffled[sample]  # reads the indices
    number = int(shuffled.shuffle_index[sample])
    (first, offset), (last, _) = shuffled.sample_index[number], shuffled.sample_index[number + 1]
    return {
        "sample": index,
        "corpus": str(shuffled.dataset.path_prefix),
        "epoch": epoch,
        "first_document": int(shuffled.document_index[int(first)]),
        "offset": int(offset),
        "last_document": int(shuffled.document_index[int(last)]),
    }
