"""The body of `python -m msae.evaluate`: what training measures at its end, of any SAEs, on the same held-out rows."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

from msae.data.batches import ValBatches
from msae.data.rows import Rows
from msae.devices import Device, check_device, pick_device
from msae.evaluation.evaluate import Evaluation, HeldOut, calibrate, evaluate
from msae.evaluation.language_model import check_can_replace
from msae.files import write, write_json
from msae.progress import say
from msae.runs import Run, open_run
from msae.sae import MatryoshkaSAE
from msae.sae.fast import KERNELS
from msae.settings import Count, Natural, as_plain, changed, decode, settings
from msae.sources.bridge import load_bridge, model_identity
from msae.sources.language_model import WEIGHTS

JSON, PICTURE = "evaluation.json", "evaluation.png"
AXES = {"FVU": "fvu", "CE score": "ce_score"}  # of the picture, against L0


@settings
class Evaluate:
    """`python -m msae.evaluate`."""

    sae: str | list[str]
    """runs/<run> (all of its arms), runs/<run>/<arm>, a directory in any form that is read, or a list of them."""
    shards: str | None = None
    """Shard directory; null: the one that the first SAE was trained on."""
    target_shards: str | None = None
    """Shard directory of what a transcoder reconstructs; null: the one of the same harvest."""
    rows: Literal["half", "all"] = "half"
    """Held-out rows to measure: the second half, as training does, or all, with those it calibrated thresholds on."""
    calibrate: bool = False
    """Set thresholds anew on the first half of the held-out rows, where they are calibrated, as BatchTopK's are."""
    language_model: str | None = "auto"
    """Model for the cross-entropies: a hub name or directory; auto: the run's, if the rows are its; null: none."""
    ce_sequences: Natural | None = None
    """Held-out sequences for the cross-entropies; 0: none; null: as in the first run."""
    batch_tokens: Count | None = None
    """Rows of a batch; null: as in the first run."""
    device: Device = "auto"
    """Where SAEs and the language model run."""
    out: str | None = None
    """Directory for evaluation.json and evaluation.png; null: print only."""

    def __post_init__(self) -> None:
        if not self.sae:
            raise ValueError(f"sae={self.sae or '[]'} names no SAE; give sae=runs/<run>")
        if self.calibrate and self.rows == "all":
            raise ValueError("calibrate=true uses the first half of the rows, so rows=all would measure it; drop one")
        check_device(self.device)
        if self.out is not None and Path(self.out).exists() and not Path(self.out).is_dir():
            raise ValueError(f"out={self.out} is a file; give out=<directory>")


def evaluate_all(options: Evaluate) -> dict[str, dict[str, float]]:
    """The figures of every SAE by its path, all measured on the same batches; writes them to `out`, if it is given.

    Raises ValueError in one line.
    """
    paths = [options.sae] if isinstance(options.sae, str) else options.sae
    runs = {str(run): run for path in paths for run in open_run(path).with_sae()}
    if not runs:
        raise ValueError(f"no arm of {', '.join(paths)} has an SAE; see python -m msae.runs")
    saes = {name: with_its_kernels(run.load_sae()) for name, run in runs.items()}
    check_alike(saes)
    evaluation = decode(Evaluation, first_setting(runs, "evaluation") or {}, "evaluation")
    if options.ce_sequences is None:
        options = changed(options, ce_sequences=evaluation.ce_sequences)
    if options.batch_tokens is None:
        options = changed(options, batch_tokens=first_setting(runs, "data.batch_tokens") or HeldOut.batch_tokens)
    held_out = held_out_of(options, runs, saes)
    figures = {}
    for name, sae in saes.items():
        if len(saes) > 1:
            say(name)
        sae.to(pick_device(options.device))
        if options.calibrate:
            set_thresholds(name, sae, held_out, evaluation.calibration_tokens)
        figures[name] = evaluate(sae, held_out)
        sae.cpu()
    if options.out is not None:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        write_figures(Path(options.out), options, saes, held_out, figures)
    return figures


def first_setting(runs: dict[str, Run], key: str) -> Any:
    """The value of a dotted key in the first run that has it, None without one."""
    return next((value for run in runs.values() if (value := run.setting(key)) is not None), None)


def with_its_kernels(sae: MatryoshkaSAE) -> MatryoshkaSAE:
    """The SAE with the kernels that it was trained with, so that the figures are those of its run to the last digit."""
    trained = (sae.metadata.get("msae") or {}).get("training") or {}
    kernels = trained.get("kernels")
    if kernels in KERNELS and kernels != "triton":  # which may not run here
        sae.kernels = kernels
    return sae


def set_thresholds(name: str, sae: MatryoshkaSAE, held_out: HeldOut, most: int) -> None:
    """Calibrate on at most so many of the rows before those that are measured; say what became of the thresholds."""
    if sae.sparsity.threshold_is != "calibrated":
        say(f"{name}: thresholds kept, those of {sae.sparsity.name} are not calibrated")
        return
    stop = min(held_out.start, most)
    calibrate(sae, ValBatches(held_out.rows, held_out.batch_tokens, stop=stop))
    say(f"{name}: thresholds set to {sae.k:g} active latents a token on the first {stop:,} rows")


# --- which rows -------------------------------------------------------------------------------------------------------


def held_out_of(options: Evaluate, runs: dict[str, Run], saes: dict[str, MatryoshkaSAE]) -> HeldOut:
    """The rows that are measured. Raises ValueError in one line if an SAE cannot read or reconstruct them."""
    run, sae = next(iter(runs.values())), next(iter(saes.values()))
    rows = run.rows(sae, options.shards, held_out_alone=True)
    target = run.target_rows(sae, rows, options.target_shards) if sae.is_transcoder else None
    if target is None and options.target_shards is not None:
        raise ValueError(f"target_shards={options.target_shards} is for a transcoder, which {run} is not; drop it")
    for name, of_name in saes.items():
        check_fits(name, of_name, rows, target, options.calibrate)
    count = sum(rows.rows("val"))
    if count < 2:
        raise ValueError(
            f"{rows} has {count} held-out rows, expected at least 2; give shards=<a directory that has them>"
        )
    assert options.batch_tokens is not None
    assert options.ce_sequences is not None
    load_model = language_model_of(options, runs, rows, target or rows)
    start = count // 2 if options.rows == "half" else 0
    return HeldOut(rows, load_model, start, options.batch_tokens, options.ce_sequences, target)


def check_alike(saes: dict[str, MatryoshkaSAE]) -> None:
    """Raises ValueError in one line unless all SAEs read, and reconstruct, activations of the same kind."""
    (first, one), *others = saes.items()
    for name, sae in others:
        if one.is_transcoder != sae.is_transcoder:
            transcoder, other = (first, name) if one.is_transcoder else (name, first)
            raise ValueError(f"{transcoder} is a transcoder, {other} is not; evaluate them one by one")
        for what, a, b in (("d_in", one.d_in, sae.d_in), ("d_out", one.d_out, sae.d_out)):
            if a != b:
                raise ValueError(f"{first} has {what}={a}, {name} has {what}={b}; evaluate them one by one")


def check_fits(name: str, sae: MatryoshkaSAE, rows: Rows, target: Rows | None, calibrates: bool) -> None:
    """Raises ValueError in one line for an SAE of another width or without a threshold; prints that a hook differs."""
    for width, key, of in ((sae.d_in, "shards", rows), (sae.d_out, "target_shards", target or rows)):
        if width != of.d_in:
            raise ValueError(
                f"{of} has d_in={of.d_in}, {name} expects {width}; "
                f"give {key}=<the directory of the hook that it was trained on>"
            )
    if sae.threshold.isnan().any() and not sae.ranks_at_inference and not calibrates:
        raise ValueError(f"{name} has no threshold yet; give calibrate=true")
    for key, side in (("hook_name", rows), ("hook_name_out", target)):
        trained = sae.metadata.get(key)
        if side is not None and trained is not None and trained != side.hook_name:
            say(f"note: {name} was trained on {trained}, these rows are of {side.hook_name}")


# --- the language model -----------------------------------------------------------------------------------------------


def language_model_of(
    options: Evaluate, runs: dict[str, Run], rows: Rows, replaced: Rows
) -> Callable[[str], Any] | None:
    """What loads, once, the model that made the rows; None where none is asked for, or with `auto` none is found.

    Raises ValueError in one line if the model that is asked for is not that one, or nothing can be spliced into it.
    """
    if options.language_model is None or options.ce_sequences == 0:
        return None
    is_auto, is_text = options.language_model == "auto", rows.identity.get("source") == "language_model"
    if is_auto and not is_text:
        return None
    try:
        if not is_text:
            raise ValueError(f"{rows} has no rows of a language model; drop language_model")
        check_can_replace(replaced.hook_name)
        return harvested_model(None if is_auto else options.language_model, runs, rows)
    except ValueError as error:
        if not is_auto:
            raise
        say(f"no cross-entropy: {error}")
        return None


def harvested_model(given: str | None, runs: dict[str, Run], rows: Rows) -> Callable[[str], Any]:
    """What loads, once, this model, or the first that a run names, as it ran when it was harvested.

    Raises ValueError in one line unless it is the one that was harvested.
    """
    sources = [run.setting("data.source") or {} for run in runs.values()]
    named = [source for source in sources if source.get("model") is not None and given in (None, source["model"])]
    if given is None and not named:
        raise ValueError("no run names its language model; give language_model=<hub name or directory>")
    source = named[0] if named else {"model": given}
    model, revision = str(source["model"]), source.get("revision")
    try:
        is_harvested = model_identity(model, revision, WEIGHTS) == rows.identity["model"]
    except ValueError as error:
        raise ValueError(str(error).replace("data.source.model", "language_model")) from None
    if not is_harvested:
        raise ValueError(
            f"{model} is not the language model that {rows} was made with; "
            "give language_model=<the one that was harvested>, or null"
        )

    @cache
    def load(device: str) -> Any:
        return load_bridge(
            model,
            device=device,
            dtype=rows.identity["model_dtype"],
            compatibility_mode=rows.identity["compatibility_mode"],
            revision=revision,
            tokenizer=source.get("tokenizer"),
        )

    return load


# --- the files --------------------------------------------------------------------------------------------------------


def write_figures(
    out: Path,
    options: Evaluate,
    saes: dict[str, MatryoshkaSAE],
    held_out: HeldOut,
    figures: dict[str, dict[str, float]],
) -> None:
    """Write evaluation.json, without figures that are not finite, and evaluation.png: FVU and CE score against L0."""
    from msae.evaluation.pictures import lines  # matplotlib takes a second to import

    sides = {"shards": held_out.rows, "target_shards": held_out.target}
    content = {
        "settings": as_plain(options),
        "rows": sum(held_out.rows.rows("val")) - held_out.start,
        **{
            key: {
                "directory": of.name,
                "hook_name": of.hook_name,
                "identity_hash": of.identity_hash,
            }
            for key, of in sides.items()
            if of is not None
        },
        "saes": {
            name: {
                "d_sae": sae.d_sae,
                "prefixes": sae.prefixes,
                "sparsity": sae.sparsity.name,
                "hook_name": sae.metadata.get("hook_name"),
                "figures": {key: value for key, value in figures[name].items() if math.isfinite(value)},
            }
            for name, sae in saes.items()
        },
    }
    write_json(out / JSON, content, indent=2)
    if panels := against_l0(saes, figures):
        figure = lines(panels, "active latents a token (L0)", title="held-out rows, a point for each prefix")
        write(out / PICTURE, lambda path: figure.savefig(path, format="png", dpi=150, bbox_inches="tight"))


def against_l0(
    saes: dict[str, MatryoshkaSAE], figures: dict[str, dict[str, float]]
) -> dict[str, dict[str, list[tuple[Any, float, float, float]]]]:
    """For each axis and SAE the points of its prefixes, as `lines` draws them; SAEs are named as shortly as can be."""
    short = {name: Path(name).name for name in saes}
    labels = short if len(set(short.values())) == len(short) else {name: name for name in saes}
    panels = {}
    for axis, metric in AXES.items():
        series = {}
        for name, sae in saes.items():
            values = [(figures[name].get(f"val/{metric}/p{m}", math.nan), m) for m in sae.prefixes]
            points = [(figures[name][f"val/l0/p{m}"], *3 * (y,)) for y, m in values if math.isfinite(y)]
            if points:
                series[labels[name]] = points
        if series:
            panels[axis] = series
    return panels
