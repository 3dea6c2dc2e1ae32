"""Running properties on drawn examples."""

import time
from dataclasses import dataclass, field

import hypothesis
import torch

from .properties import PROPERTIES, Refused, Subject
from .strategies import DTYPES, examples

LIMIT = 1 << 17
TINY = 48
SHRINK_SECONDS = 8


@dataclass
class Outcome:
    """What the examples of one property gave: how many ran, the worst error per kind, and the failure if there is one."""

    examples: int = 0
    worst: object = None
    where: object = None
    failure: str | None = None
    refused: str | None = None
    errors: dict = field(default_factory=dict)

    def take(self, example, errors):
        self.examples += 1
        for e in errors or ():
            kind = e.tensor.split()[0]
            if kind not in self.errors or e.ratio > self.errors[kind][0].ratio:
                self.errors[kind] = (e, example)
            if self.worst is None or e.ratio > self.worst.ratio:
                self.worst, self.where = e, example


def run(check, subject, *, count, dtypes=DTYPES, device="cpu", limit=LIMIT, tiny=False, seed=None, step=None):
    """Runs one property on `count` examples and returns its Outcome. seed=None: the same examples every time. step: called after each."""
    outcome, failed, since = Outcome(), {}, None

    @hypothesis.settings(max_examples=count, deadline=None, database=None, derandomize=seed is None, report_multiple_bugs=False,
                         suppress_health_check=list(hypothesis.HealthCheck), verbosity=hypothesis.Verbosity.quiet)
    @hypothesis.given(examples(subject.case, dtypes=dtypes, device=device, limit=TINY if tiny else limit, extreme=not tiny))
    def property_holds(example):
        nonlocal since
        text = None
        if since and time.monotonic() - since > SHRINK_SECONDS:  # the search for a smaller example ends: only what is known to fail fails
            text = failed.get(str(example))
        else:
            try:
                outcome.take(example, check(subject, example))
            except Refused as problem:
                outcome.refused = str(problem)
            except Exception as problem:
                since = since or time.monotonic()
                text = failed[str(example)] = f"{subject}, {check.__name__}: {_text(problem)}\n  on {example}"
            if step and not failed:
                step()
        if text:
            raise AssertionError(text)

    try:
        (property_holds if seed is None else hypothesis.seed(seed)(property_holds))()
    except AssertionError as problem:
        outcome.failure = str(problem)
    return outcome


def _text(problem):
    return str(problem) if isinstance(problem, AssertionError) else f"{type(problem).__name__}: {problem}"


def check(fn, reference, case, *, examples=50, device="cpu", dtypes=DTYPES, properties=None):
    """Holds an op of yours to `reference`, a plain PyTorch function of the same keyword arguments, on drawn examples of `case`.

    Properties: values and gradients within twice plain PyTorch's error and one rounding, against the reference in float64; second order,
    forward mode, vmap, bits from run to run and for any thread count, inputs unharmed, batch independence (for the arguments named in
    case.batched), numerical derivatives (if float64 is among `dtypes`), torch.compile, torch.export. `properties` names the ones to run.
    Returns {property: Outcome}. Raises AssertionError with the property, the error and the input on which it fails, the smallest found;
    ValueError for an unknown property.
    """
    names = [p.name for p in PROPERTIES if not p.ours]
    if unknown := set(properties or ()) - set(names):
        raise ValueError(f"check: properties wants some of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    subject = Subject(getattr(fn, "__name__", str(fn)), case.taking(fn), case.taking(reference), case)
    outcomes = {}
    for p in PROPERTIES:
        wanted = p.name in properties if properties else not p.ours and not (p.tiny and torch.float64 not in dtypes)
        if wanted:
            result = run(p.check, subject, count=p.count(examples), dtypes=(torch.float64,) if p.tiny else dtypes, device=device,
                         tiny=p.tiny)
            if result.failure:
                raise AssertionError(result.failure)
            outcomes[p.name] = result
    return outcomes
