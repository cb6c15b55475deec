"""FineWeb-Edu into token shards, as `train.py` expects them in edu_fineweb10B/.

    python fineweb.py                                        # sample-10BT from the Hugging Face Hub, streamed
    python fineweb.py --source fineweb-edu/                  # from a copy in the Hub's layout: parquet, jsonl or text
    python fineweb.py --subset sample-100BT                  # or sample-350BT, or a crawl such as CC-MAIN-2024-10
    python fineweb.py --pretokenized                         # tokens that others published: no tokenizing
    torchrun --nproc_per_node=4 fineweb.py                   # each process takes a part of the files

The first shard is validation. The same command goes on where a killed one stopped; prepare.py does the work.
"""
import dataclasses
from pathlib import Path

import huggingface_hub
import tyro

from common.errors import UserError, report_user_errors
from corpus import sources
from prepare import Options, prepare

REPOSITORY = "HuggingFaceFW/fineweb-edu"
TOKENS_REPOSITORY = "kjj0/finewebedu10B-gpt2"  # sample-10BT as modded-nanogpt publishes it


@dataclasses.dataclass
class FinewebConfig(Options):
    """Turns FineWeb-Edu into token shards."""

    subset: str = "sample-10BT"
    """sample-10BT, sample-100BT, sample-350BT, or the name of a crawl."""
    source: Path | None = None
    """A folder with the dataset, or with its tokens; the Hugging Face Hub when not given."""
    out: Path | None = None
    """Folder for the shards; edu_fineweb10B for sample-10BT when not given, and so on."""
    pretokenized: bool = False
    """Take GPT-2 tokens that others made, from the folder or from the Hub."""


def main(config: FinewebConfig):
    out = config.out or Path(f"edu_fineweb{config.subset.removeprefix('sample-').removesuffix('T')}")
    name = f"{REPOSITORY}:{config.subset}"
    if config.pretokenized:
        source = sources.shards_source(name, config.source or download_tokens(config.subset))
    elif config.source:
        source = sources.local_source(name, subset_folder(config.source, config.subset), out)
    else:
        source = sources.hub_source(REPOSITORY, config.subset, out)
    prepare(source, "edufineweb", out, "gpt2", config)


def subset_folder(folder: Path, subset: str) -> Path:
    """Where a copy of the dataset keeps the subset: as the Hub does, or the folder itself where it holds nothing else."""
    for place in subset.replace("sample-", "sample/"), f"data/{subset}", subset:
        if (folder / place).is_dir():
            return folder / place
    if (folder / "sample").is_dir() or (folder / "data").is_dir():
        raise UserError(f"{folder} holds no {subset}, neither under sample/ nor under data/.")
    return folder


def download_tokens(subset: str) -> Path:
    """The folder with the published tokens of sample-10BT, 20 GB in the Hub's cache."""
    if subset != "sample-10BT":
        raise UserError(f"Tokens are published of sample-10BT, not of {subset}: give a folder of shards with --source.")
    try:
        return Path(huggingface_hub.snapshot_download(TOKENS_REPOSITORY, repo_type="dataset", allow_patterns="*.bin"))
    except Exception as error:  # the Hub's client and the layers below it have exceptions of their own
        raise UserError(f"{TOKENS_REPOSITORY} could not be downloaded ({type(error).__name__}): the same command goes on with "
                        "it, and --source takes a folder of shards.") from None


if __name__ == "__main__":
    with report_user_errors(every_rank=True):
        main(tyro.cli(FinewebConfig))
