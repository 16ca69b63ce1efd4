"""Build the page of a run: results, limits, pictures, training and settings."""

from __future__ import annotations

import platform
import shlex
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version

from srm_model.config import SRMConfig
from srm_model.reports.blocks import caption, missing, pairs, row, section, table, whole_page
from srm_model.reports.markup import Child, Markup, element
from srm_model.reports.results import estimates, limits, results
from srm_model.reports.run import Run
from srm_model.reports.scores import pictures, scatters
from srm_model.reports.text import budget_text, clock, count, fixed, listing, setting
from srm_model.reports.training import mechanism, training

NO_BREAK = "\N{NO-BREAK SPACE}"
PACKAGES = ("srm-iqa", "torch", "timm", "numpy", "scipy")


def render(run: Run) -> Markup:
    """Return the page as HTML."""
    title = run.title or f"Run {run.folder.resolve().name}"
    found = estimates(run)
    main = element(
        "main",
        _header(run, title),
        _notice(run),
        section("Clean and attacked", results(run, found)),
        section("Limits of these numbers", limits(run, found)),
        section("Prediction against label", scatters(run)),
        section("Attacked images", pictures(run)),
        section("Training", training(run)) if run.model is None else None,
        section("Diagnostics of the neck", mechanism(run)) if run.model is None else None,
        section("Settings and reproduction", _settings(run)),
        element("footer", f"Written by srm-iqa {_version('srm-iqa')}."),
    )
    return whole_page(title, main)


def _header(run: Run, title: str) -> Markup:
    took = f"took {clock(run.seconds)}" if run.seconds is not None else None
    meta = " · ".join(item for item in (_moment(run.created), took) if item)
    return element(
        "header",
        element("h1", title),
        element("p", meta, class_="meta") if meta else None,
        element("p", f"{_trained(run)} {_tested(run)}", class_="lede"),
    )


def _moment(created: str | None) -> str | None:
    """Format an ISO 8601 timestamp; return text that is no timestamp unchanged."""
    try:
        return f"{datetime.fromisoformat(created):%d %B %Y, %H:%M %Z}".strip(", ") if created else None
    except ValueError:
        return created


def _trained(run: Run) -> str:
    name = run.dataset.get("name")
    if run.model is not None:
        said = f"The model {run.model} comes from another package. Its scores were scaled to the mean and standard "
        return f"{said}deviation of the labels{f' (data: {name})' if isinstance(name, str) else ''}."
    if not run.necks:
        return "No trained neck was found in this run."
    names = [neck.name for neck in run.necks]
    said = f"The neck{'s' * (len(names) > 1)} {listing(names)} {'were' if len(names) > 1 else 'was'} trained"
    if backbones := sorted({neck.backbone for neck in run.necks if neck.backbone}):
        said += f" on the backbone{'s' * (len(backbones) > 1)} {listing(backbones)}"
    if epochs := sorted({len(neck.history) for neck in run.necks if neck.history}):
        said += f" for {listing(epochs)} epoch{'s' * (epochs != [1])}"
    splits = run.dataset.get("splits")
    images = splits.get("train") if isinstance(splits, dict) else None
    if isinstance(images, int):
        said += f" on {count(images, 'image')}"
    if isinstance(name, str):
        said += f" (data: {name})"
    return said + "."


def _tested(run: Run) -> str:
    sizes = sorted({len(neck.evaluation.mos) for neck in run.necks if neck.evaluation})
    said = f"{'Each' if len(run.necks) > 1 else 'It'} was tested on {listing(sizes)} images"
    if not sizes:
        said = "No test scores were found"
    if not run.budgets:
        return f"{said}; no attack was run."
    attacked = sorted({len(item.mos) for neck in run.necks for item in neck.attacks})
    which = f"{listing(attacked)} of them" if sizes else f"{listing(attacked)} images"
    if attacked == sizes:
        which = "all of them"
    budgets = listing(budget_text(budget).replace(" ", NO_BREAK) for budget in run.budgets)
    if run.model is not None:
        return f"It was attacked on {which} at {budgets}."
    return f"{said}, and attacked on {which} at {budgets}."


def _notice(run: Run) -> Markup | None:
    kind, _, name = (run.labels or "").partition(":")
    if kind == "metric":
        strong = f"The labels come from the metric {name.upper()}, not from people."
        text = (
            f" {name.upper()} is a full-reference metric: it compares each distorted picture with its original. Every "
            f"correlation on this page is agreement with {name.upper()}, not with human judgement."
        )
    elif kind == "opinions":
        strong = "The labels are people's opinions of similar images."
        text = (
            f" They are the mean opinion scores of {name}'s images with the same photograph, distortion type and "
            f"level. The images here were synthesised; this dataset is not {name}. Type and level alone predict much "
            "of an opinion."
        )
        if isinstance(ceiling := run.dataset.get("type_level_srocc"), float):
            text += f" On the test images they reach an SROCC of {fixed(ceiling)}."
    else:
        return None
    return element("p", element("strong", strong), text, class_="notice", role="note")


def _settings(run: Run) -> Child:
    data = pairs(run.dataset) if run.dataset else missing("The run does not describe its dataset.")
    again = missing("The run did not record its command.")
    if run.command:
        again = element("pre", element("code", "\n".join(run.command)))
    return [
        element(
            "div",
            element("div", element("h3", "Data"), data),
            element("div", element("h3", "Versions"), _versions(run)),
            class_="pair",
        ),
        _configurations(run) if run.model is None else None,
        element("h3", "Commands"),
        again,
        caption("To write this page again from the run's files:"),
        element("pre", element("code", shlex.join(["srm-iqa", "report", str(run.folder)]))),
    ]


def _configurations(run: Run) -> Child:
    return [
        element("h3", "Settings that differ from the defaults"),
        _configuration(run),
        caption(
            "Settings of each neck's training. The settings of the attacks are stated with their results."
        ),
    ]


def _configuration(run: Run) -> Child:
    necks = [neck for neck in run.necks if neck.config]
    if not necks:
        return missing("No configuration was found.")
    defaults = {key: setting(value) for key, value in SRMConfig().to_dict().items()}
    rows = {}
    for key, default in defaults.items():
        values = [setting(neck.config[key]) if key in neck.config else default for neck in necks]
        cells = [element("code", value) for value in (*values, default)]
        marked = "changed" if set(values) != {default} else None
        rows[key] = row(element("code", key), *cells, words=range(1, len(cells) + 1), class_=marked)
    columns = ["Setting", *(neck.name for neck in necks), "default"]
    changed = [line for line in rows.values() if 'class="changed"' in line]
    words = range(len(columns))
    return [
        table(columns, changed, words=words) if changed else element("p", "None."),
        element("details", element("summary", "All settings"), table(columns, [*rows.values()], words=words)),
    ]


def _versions(run: Run) -> Child:
    if run.versions:
        return pairs(run.versions | _kernels(run))
    found = {"Python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    return [
        pairs(found | _kernels(run)),
        caption("Versions that wrote this page; the run did not record its own."),
    ]


def _kernels(run: Run) -> dict[str, str]:
    """Return a text for each neck that says which backends ran in evaluation and attacks, and why they were chosen.

    The reason is a setting, a verdict of `srm-iqa verify`, or that there is no verdict.
    """
    found = {}
    for neck in run.necks:
        sentences = [neck.evaluation.kernels if neck.evaluation else None]
        sentences += [attacked.kernels for attacked in neck.attacks]
        said = dict.fromkeys(filter(None, sentences))
        if said:
            found[f"kernels of {neck.name}"] = "; ".join(said)
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
