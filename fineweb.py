"""Tokenize FineWeb-Edu into the shards that `train.py` expects in edu_fineweb10B/.

    python fineweb.py                                  # streams sample-10BT from the Hub
    python fineweb.py --source fineweb-edu/            # a local copy: parquet, jsonl or text
    python fineweb.py --subset sample-100BT            # also sample-350BT or CC-MAIN-2024-10
    python fineweb.py --pretokenized                   # downloads published tokens
    torchrun --nproc_per_node=4 fineweb.py             # each process takes a part of the files

The first shard is for validation. Run the same command again to resume. prepare.py does the work.
"""
import dataclasses
from pathlib import Path

from common.program import report_user_errors

import tyro

from common.errors import UserError
from corpus import sources
from prepare import ShardOptions, prepare

REPOSITORY = "HuggingFaceFW/fineweb-edu"
TOKENS_REPOSITORY = "kjj0/finewebedu10B-gpt2"  # modded-nanogpt's tokens of sample-10BT


@dataclasses.dataclass
class FinewebConfig(ShardOptions):
    """Turns FineWeb-Edu into token shards."""

    subset: str = "sample-10BT"
    """sample-10BT, sample-100BT, sample-350BT, or the name of a crawl."""
    source: Path | None = None
    """Folder with a copy of the dataset or of its tokens; the Hugging Face Hub if not given."""
    out: Path | None = None
    """Output folder; edu_fineweb10B for sample-10BT, and so on, if not given."""
    pretokenized: bool = False
    """Use existing GPT-2 tokens, from the folder or from the Hub."""


def main(config: FinewebConfig):
    size = config.subset.removeprefix("sample-").removesuffix("T")
    out = config.out or Path(f"edu_fineweb{size}")
    name = f"{REPOSITORY}:{config.subset}"
    if config.pretokenized:
        folder = config.source or download_tokens(config.subset)
        source = sources.shards_source(name, folder)
    elif config.source:
        folder = find_subset(config.source, config.subset)
        source = sources.local_source(name, folder, out)
    else:
        source = sources.hub_source(REPOSITORY, config.subset, out)
    prepare(source, "edufineweb", out, "gpt2", config)


def find_subset(folder: Path, subset: str) -> Path:
    """Returns the subset's folder in a copy of the dataset.

    The copy has the Hub's layout, or the folder itself holds the subset and nothing else.
    """
    for place in subset.replace("sample-", "sample/"), f"data/{subset}", subset:
        if (folder / place).is_dir():
            return folder / place
    if (folder / "sample").is_dir() or (folder / "data").is_dir():
        raise UserError(f"{folder} holds no {subset}: expected it under sample/ or data/.")
    return folder


def download_tokens(subset: str) -> Path:
    """Downloads the published tokens of sample-10BT (20 GB) into the Hub's cache."""
    if subset != "sample-10BT":
        raise UserError(f"Tokens are published for sample-10BT only, not for {subset}: "
                        "give a folder of shards with --source.")
    import huggingface_hub  # noqa: PLC0415 (slow)
    try:
        return Path(huggingface_hub.snapshot_download(
            TOKENS_REPOSITORY, repo_type="dataset", allow_patterns="*.bin"))
    except Exception as error:  # the Hub's client and the layers below raise their own types
        raise UserError(f"{TOKENS_REPOSITORY} could not be downloaded ({type(error).__name__}): "
                        "run the same command again to resume, or give a folder of shards with "
                        "--source.") from None


if __name__ == "__main__":
    with report_user_errors(every_rank=True):
        main(tyro.cli(FinewebConfig))
