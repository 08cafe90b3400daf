"""Puts a data set where the other programs look for it: your own folders, a public data set, or a rendered sample.

    python prepare_data.py folder photos/good --bad photos/scratch photos/dent data/bolt
    python prepare_data.py sample                               # rendered, within a minute, nothing to download
    python prepare_data.py mvtec --accept-licence               # 5.3 GB, not for commercial use
    python prepare_data.py mtd CHECKOUT magnetic_tile_data
    python prepare_data.py visa VisA_20220922 visa_data         # and btad, mpdd, kolektor, mvtec2, elpv

A data set that is there already is never changed.
"""

import argparse
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import config
from models.errors import InputError
from utils.atomic import atomic_folder
from utils.console import Parser, command
from utils.data import layouts, mvtec
from utils.data.archives import check_sha256, download
from utils.data.magnetic_tile import SOURCE, convert

BAD = "folder of bad parts, named after their defect; further ones may follow, before OUT"
COPY = "copy the images and masks instead of linking to them"


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Prepare the data set that the first argument names."""
    commands = parser()
    args, rest = commands.parse_known_args(argv)
    if rest and (not getattr(args, "bad", None) or any(text.startswith("-") for text in rest)):
        commands.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # of 'folder GOOD --bad A B OUT' argparse takes B for OUT
        *more, args.out = [args.out, *map(Path, rest)]
        args.bad += more
    args.prepare(args)


def parser() -> argparse.ArgumentParser:
    """The subcommands and their options."""
    top = Parser("Prepare a data set in the MVTec AD layout.")
    sets = top.add_subparsers(required=True, title="data sets", metavar="DATA_SET")

    own = sets.add_parser("folder", help="make a category of your own folders of good and bad parts")
    own.add_argument("good", type=Path, metavar="GOOD", help="folder of good parts")
    own.add_argument("--bad", type=Path, metavar="DIR", action="append", default=[], help=BAD)
    own.add_argument("--masks", type=Path, metavar="DIR", help="masks of the bad parts, if not beside their images")
    own.add_argument("out", type=Path, metavar="OUT", help="folder that becomes the category, such as data/bolt")
    share = "share of the good parts to test on (default: %(default)s)"
    own.add_argument("--test-share", type=share_of, default=0.2, metavar="SHARE", help=share)
    how = own.add_mutually_exclusive_group()
    how.add_argument("--seed", type=int, default=config.SEED, help="which ones, drawn (default: %(default)s)")
    how.add_argument("--by-date", action="store_true", help="the newest ones, by date of last change")
    own.add_argument("--copy", action="store_true", help=COPY)
    own.set_defaults(prepare=prepare_folder)

    sample = sets.add_parser("sample", help="render a small set to try the programs with")
    sample.add_argument("out", nargs="?", type=Path, default="sample_data", metavar="OUT", help="default: %(default)s")
    sample.set_defaults(prepare=prepare_sample)

    mtd = sets.add_parser("mtd", help="convert a checkout of the Magnetic Tile Defects data set")
    mtd.add_argument("source", type=Path, metavar="SRC", help=f"checkout of {SOURCE}")
    mtd.add_argument("out", type=Path, metavar="OUT", help="data folder that gets the category magnetic_tile")
    mtd.set_defaults(prepare=prepare_mtd)

    full = sets.add_parser("mvtec", help="fetch, unpack and verify MVTec AD", epilog=mvtec.LICENCE)
    full.add_argument("out", nargs="?", type=Path, default=config.DATA_PATH, metavar="OUT", help="default: %(default)s")
    full.add_argument("--accept-licence", "--accept-license", action="store_true", help="you accept the licence below")
    full.add_argument("--archive", type=Path, metavar="FILE", help=f"use this {mvtec.ARCHIVE} instead of fetching it")
    full.add_argument("--url", default=mvtec.URL, help="fetch the archive from here instead of MVTec's server")
    full.add_argument("--sha256", default=mvtec.SHA256, help="checksum of the archive instead of the official one's")
    full.add_argument("--verify-only", action="store_true", help="say what OUT holds and lacks, change nothing")
    full.set_defaults(prepare=prepare_mvtec)

    for name, public in layouts.PUBLIC_SETS.items():
        one = sets.add_parser(name, help=f"convert {public.title}", epilog=f"The data set: {public.page}")
        one.add_argument("source", type=Path, metavar="SRC", help="its folder, as it was unpacked")
        one.add_argument("out", type=Path, metavar="OUT", help="data folder that gets its categories")
        one.add_argument("--copy", action="store_true", help=COPY)
        one.set_defaults(prepare=prepare_public, read=public.read)
    return top


def share_of(text: str) -> float:
    """A share between 0 and 1, as the type of a flag."""
    try:
        share = float(text)
    except ValueError:
        share = 0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and below 1, not {text!r}")
    return share


def prepare_folder(args: argparse.Namespace) -> None:
    """Make OUT, a category, of a folder of good parts and of one for each defect."""
    layouts.check_free(args.out)
    good = layouts.pictures(args.good)
    if args.by_date:
        train, test = layouts.by_date(good, args.test_share)
        newest = datetime.fromtimestamp(train[-1].stat().st_mtime)
        print(f"trained on: good parts until {newest:%Y-%m-%d %H:%M:%S}, tested on: later ones")
    else:
        train, test = layouts.draw(good, args.test_share, args.seed)
    layout = layouts.own_folders(train, test, args.bad, args.masks)
    layout.write(args.out, args.copy)
    print(layout.summary(args.out))
    suggest(args.out.parent, args.out.name)


def prepare_public(args: argparse.Namespace) -> None:
    """Bring a public data set into OUT, all of its categories or none."""
    layouts.check_free(args.out)
    layout = args.read(args.source)
    layout.write(args.out, args.copy)
    print(layout.summary(args.out))
    suggest(args.out, "all")


def prepare_sample(args: argparse.Namespace) -> None:
    """Render the sample into OUT, whole or not at all."""
    from utils.data.sample_data import DEFECTS, GOOD, PARTS, TRAIN, render_sample  # here, because it loads SciPy

    counts = {category: (TRAIN, GOOD, DEFECTS * len(kinds)) for category, (_, kinds) in PARTS.items()}
    if args.out.exists() and any(args.out.iterdir()):
        if any(check.problems for check in mvtec.check_tree(args.out, counts)):
            raise InputError(f"{args.out} holds something, but not the whole sample: name another folder or delete it")
        print(f"{args.out} holds the sample already (delete it to render it anew)")
    else:
        with atomic_folder(args.out) as folder:
            render_sample(folder)
    print(mvtec.table(mvtec.check_tree(args.out, counts)))
    print(f"{args.out}: RENDERED pictures, not photographs: they show that the programs work, not how well.")
    suggest(args.out, "all", "--backbone efficientnet_lite0")


def prepare_mtd(args: argparse.Namespace) -> None:
    """Convert a checkout of Magnetic Tile Defects into the category OUT/magnetic_tile, whole or not at all."""
    category = args.out / "magnetic_tile"
    if (category / "train" / "good").is_dir():
        print(f"{category} is there already (delete it to convert it anew)")
    else:
        counts = convert(args.source, category)
        print(f"{category}: " + ", ".join(f"{count} {split}" for split, count in counts.items()))
    suggest(args.out, "magnetic_tile", "--center-crop False")


def prepare_mvtec(args: argparse.Namespace) -> None:
    """Bring OUT to the whole of MVTec AD: verify what is there, fetch and unpack what is not."""
    checks = mvtec.check_tree(args.out, mvtec.COUNTS)
    lacking = [check.name for check in checks if check.problems]
    damaged = [check.name for check in checks if check.problems and check.exists]
    if args.verify_only or any(check.exists for check in checks):
        print(mvtec.table(checks))
    if args.verify_only and lacking:
        raise InputError(f"{args.out} is not the whole of MVTec AD: missing or incomplete: {', '.join(lacking)}")
    if damaged:
        raise InputError(f"{args.out} lacks some of {', '.join(damaged)}: move or delete these to get them anew")
    if lacking:
        fetch_mvtec(args)
        print(mvtec.table(mvtec.check_tree(args.out, mvtec.COUNTS)))
    print(f"{args.out} is the whole of MVTec AD.")
    suggest(args.out, "all")


def fetch_mvtec(args: argparse.Namespace) -> None:
    """Get the archive, unless there is one, check it, and unpack what OUT lacks."""
    if not args.accept_licence:
        raise InputError(f"{mvtec.LICENCE}. If you accept this, add --accept-licence")
    print(mvtec.LICENCE)
    archive = args.archive or args.out / mvtec.ARCHIVE
    if args.archive or archive.exists():
        check_sha256(archive, args.sha256)
    else:
        print(f"fetching {args.url}")
        download(args.url, archive, args.sha256, f"fetch it in a browser from {mvtec.PAGE} and use --archive FILE")
    mvtec.install(archive, args.out)
    print(f"{archive} is no longer needed: delete it if you like")


def suggest(data: Path, category: str, *options: str) -> None:
    """Tell the user what to run next."""
    print("next:", "python train.py --data-path", shlex.quote(str(data)), "--category", category, *options)


if __name__ == "__main__":
    raise SystemExit(main())
