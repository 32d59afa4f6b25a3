"""Print how close INT8 stays to the network, ours and its peers'. Run: ``make quantization``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable

import keep

from exporter.environment import capture
from quantization import ours, peers
from quantization.compare import Few, Peer, Race, Versus, judge_peers, race, versus, with_few_images
from quantization.networks import RECIPES, load
from quantization.table import Result, as_json, as_markdown

QUICK_NETS = ("r64", "mb64")
QUICK_PEERS = ("ort-minmax-in+add", "ort-percentile-in+add", "modelopt-max", "modelopt-entropy")
RIVAL = "modelopt-entropy"  # what our wall time is held against


def main() -> None:
    asked = _arguments()
    nets = asked.nets or (QUICK_NETS if asked.quick else tuple(RECIPES))
    settings = asked.peers or (QUICK_PEERS if asked.quick else tuple(peers.SETTINGS))
    build = not asked.quick and not asked.no_builds
    versions = peers.install()
    rows: list[Versus] = []
    theirs: list[Peer] = []
    few: list[Few] = []
    races: list[Race] = []
    for name in nets:
        network = load(name)
        candidates = {}
        judged = judge_peers(network, settings, versions, threads=1, build=build)
        for peer, model in judged:
            theirs.append(peer)
            _say(f"{name}: {peer.setting}: {peer.refused or peer.score}")
            if model is not None:
                candidates[peer.setting] = model
        for setting in ours.SETTINGS:
            rows.append(versus(network, setting, candidates, build=build))
            _say(f"{name}: {setting.name}: {rows[-1].score}, gain {rows[-1].gain}")
        if asked.draws:
            found = with_few_images(
                network, ours.RECIPE, versions, seeds=range(1, 1 + asked.draws), threads=1
            )
            few.extend(found)
        if asked.rounds:
            races.append(race(network, ours.RECIPE, RIVAL, rounds=asked.rounds))
    options = {setting.name: setting.options for setting in ours.SETTINGS}
    measured = (tuple(rows), tuple(theirs), tuple(few), tuple(races))
    result = Result(keep.today(), capture(), versions, options, *measured)
    keep.keep("quantization", as_markdown(result), as_json(result), asked)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="quantization", description=__doc__)
    parser.add_argument("--nets", type=_names(RECIPES), help=f"some of {','.join(RECIPES)}")
    parser.add_argument("--peers", type=_names(peers.SETTINGS), help="some of the peers' settings")
    parser.add_argument("--draws", type=int, default=0, help="draws of few calibration images")
    parser.add_argument("--rounds", type=int, default=0, help="rounds of timing against ModelOpt")
    parser.add_argument("--no-builds", action="store_true", help="leave TensorRT-RTX out")
    parser.add_argument("--quick", action="store_true", help="two networks, four peers, no builds")
    keep.add_options(parser)
    return parser.parse_args()


def _names(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    def names(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        if unknown := set(chosen) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not known")
        return chosen

    return names


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
