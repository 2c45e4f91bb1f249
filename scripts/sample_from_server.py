"""Sample rationales from a server that speaks the OpenAI completions protocol: vLLM, llama.cpp, ...

    python scripts/sample_from_server.py --recipe gsm8k-0.5b --server http://127.0.0.1:8000 --out r.jsonl
    empg-lite score r.jsonl
    empg-lite fit r.jsonl --recipe gsm8k-0.5b --output-dir runs/from-server

Asks POST SERVER/v1/completions for K completions of each problem of the recipe's training split, with the
recipe's prompt template and stop strings, at temperature 1. What comes back is stored as text: `fit`
tokenizes it. Problems follow each other as in `empg-lite sample`, as long as no prompt is longer than
`data.max_prompt_tokens`. Rows are appended problem by problem: a killed command is repeated, completes the
file and then changes nothing.

Other sampling settings of the server would change the distribution that is learned from. vLLM takes them from
the model's generation_config.json, llama.cpp has its own; --extra switches them off. A server that refuses
fields it does not know wants --extra '{}'.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from empg_lite.core.errors import DataError, EmpgError, Interrupted, MissingInput, RecipeError, UsageError
from empg_lite.core.rationale import FinishReason, Problem, Rationale
from empg_lite.core.safe_text import safe
from empg_lite.data.sources import ProblemStream, load_splits
from empg_lite.policy.templates import Template, load_template
from empg_lite.recipe.file import load_recipe
from empg_lite.recipe.schema import Recipe, refused_sampling
from empg_lite.run import store
from empg_lite.run.rollouts import (
    RolloutHeader,
    header_line,
    kept_length,
    rationale_line,
    read_rollouts,
)

EXTRA = '{"top_k": -1, "min_p": 0, "repetition_penalty": 1}'
#: Statuses of a server that is busy or starting.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Server:
    """Where to ask, and how patiently.

    Attributes:
        url: without ``/v1/completions``.
        key: sent as a bearer token; None sends none.
        retries: how often a request is repeated, after 1, 2, 4, ... (at most 30) times ``pause`` seconds.
        timeout: seconds without an answer after which a request has failed.
    """

    url: str
    key: str | None = None
    retries: int = 5
    timeout: float = 600.0
    pause: float = 1.0

    def complete(self, request: dict[str, Any]) -> list[tuple[str, FinishReason]]:
        """(text, finish reason) of each choice.

        Raises:
            MissingInput: nobody answers, or with a passing error, again and again.
            DataError: the request is refused, or the answer is not one.
        """
        for attempt in range(self.retries + 1):
            try:
                return _choices(self._post(request), self.url)
            except urllib.error.HTTPError as error:
                said = " ".join(error.read(2000).decode("utf-8", "replace").split())[:200]
                reason = f"HTTP {error.code} {said}".strip()
                if error.code not in _PASSING:
                    todo = "check --model and --extra, the key, and what the server logs"
                    raise DataError(f"the server refuses: {reason}", self.url, todo) from error
            except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt < self.retries:
                time.sleep(min(30.0, 2.0**attempt) * self.pause)
        what = f"no answer from the server after {self.retries + 1} requests ({reason})"
        raise MissingInput(what, self.url, "start it, then repeat the command: the file is kept")

    def _post(self, request: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        asked = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(request).encode(), headers, method="POST"
        )
        with urllib.request.urlopen(asked, timeout=self.timeout) as answer:
            return bytes(answer.read())


def _choices(answer: bytes, where: str) -> list[tuple[str, FinishReason]]:
    todo = "is this an OpenAI-style completions server?"
    try:
        choices = json.loads(answer)["choices"]
        found = [(choice["text"], choice["finish_reason"]) for choice in choices]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        said = " ".join(answer[:100].decode("utf-8", "replace").split())
        raise DataError(f"the answer is no list of completions: {said!r}", where, todo) from error
    if not found:
        raise DataError("the answer holds no completion", where, todo)
    for text, reason in found:
        if not isinstance(text, str) or reason not in ("stop", "length"):
            what = f"a completion with text {type(text).__name__} and finish_reason {reason!r}"
            raise DataError(what, where, "stop or length is needed")
    return found


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked: a recipe's problems in its own prompt. ``extra`` goes into each request."""

    recipe: Recipe
    template: Template
    problems: tuple[Problem, ...]
    model: str
    extra: dict[str, Any]

    @property
    def stop(self) -> list[str]:
        """The template's stop strings and its end token, should the server write that as text."""
        return [*self.template.stop, self.template.end]

    def header(self) -> RolloutHeader:
        """Who samples, and how: a file is completed under the same header only."""
        s = self.recipe.sampler
        sampler = {
            "engine": "server",
            "temperature": 1.0,
            "top_p": 1.0,
            "max_new_tokens": s.max_new_tokens,
            "samples_per_problem": s.samples_per_problem,
            "problems": len(self.problems),
            "extra": self.extra,
        }
        return RolloutHeader(
            self.model,
            template=self.template.sha256,
            sampler=sampler,
            seed=self.recipe.run.seed,
            reward_name=self.recipe.data.reward,
        )

    def rationales(self, server: Server, index: int) -> list[Rationale]:
        """K rationales of the problem at ``index``. A server that gives fewer at once is asked again."""
        problem, s = self.problems[index], self.recipe.sampler
        step, prompt = 1 + index // s.problems_per_step, self.template.render(problem.question)
        key = f"{self.recipe.run.seed}/{step}/{problem.id}"
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") >> 2
        found: list[tuple[str, FinishReason]] = []
        while (left := s.samples_per_problem - len(found)) > 0:
            request = {
                "model": self.model,
                "prompt": prompt,
                "n": left,
                "temperature": 1.0,
                "top_p": 1.0,
                "max_tokens": s.max_new_tokens,
                "seed": seed + len(found),
                "stop": self.stop,
            }
            found += server.complete(request | self.extra)[:left]
        return [
            Rationale(
                problem_id=problem.id,
                question=problem.question,
                gold=problem.gold,
                prompt=prompt,
                prompt_ids=(),
                completion=text,
                completion_ids=(),
                finish_reason=reason,
                step=step,
                policy_step=-1,
                sample_index=k,
                meta=problem.meta,
            )
            for k, (text, reason) in enumerate(cut(text, reason, self.stop) for text, reason in found)
        ]


def cut(text: str, reason: FinishReason, stop: Sequence[str]) -> tuple[str, FinishReason]:
    """The text before the first stop string: some servers leave it in, some overlook it."""
    ends = [at for s in stop if (at := text.find(s)) >= 0]
    return (text[: min(ends)], "stop") if ends else (text, reason)


def make_plan(recipe: Recipe, problems: int | None, model: str | None, extra: dict[str, Any]) -> Plan:
    """The first ``problems`` of the recipe's training stream; None: each training problem once.

    Raises:
        RecipeError: the recipe samples otherwise than training may.
        MissingInput, DataError: what ``load_splits`` and ``load_template`` say.
    """
    recipe = recipe.resolved()
    refusal = refused_sampling(recipe)
    if refusal:
        raise RecipeError(refusal, "sampler", "set it back")
    template = load_template(str(recipe.data.prompt))
    train = load_splits(recipe).train
    wanted, p = problems or len(train), recipe.sampler.problems_per_step
    stream = ProblemStream(train, recipe.run.seed)
    asked = [x for at in range(0, wanted, p) for x in stream.take(at, min(p, wanted - at))]
    return Plan(recipe, template, tuple(asked), model or recipe.model.name, extra)


def open_file(out: Path, plan: Plan) -> int:
    """Make ``out`` hold whole problems of this plan only; how many it holds.

    Raises:
        UsageError: it holds something else.
    """
    header, k = plan.header(), plan.recipe.sampler.samples_per_problem
    line = header_line(header) + "\n"
    other = UsageError("the file was sampled with other arguments", str(out), "name another --out")
    data = out.read_bytes() if out.exists() else b""
    if b"\n" not in data:  # nothing, or what a kill left of the header
        if not line.encode().startswith(data):
            raise other
        store.write_file(out, line)
        return 0
    segments = read_rollouts(out, torn_tail=True)
    rows, done = segments[0].rationales, len(segments[0].rationales) // k
    theirs = replace(segments[0].header, reward_name=header.reward_name)  # it may be scored under another
    expected = [p.id for p in plan.problems[:done] for _ in range(k)]
    if len(segments) > 1 or theirs != header or [r.problem_id for r in rows[: done * k]] != expected:
        raise other
    if len(rows) > done * k or not data.endswith(b"\n"):
        store.truncate(out, kept_length(out, len(rows) - done * k))
        if not out.read_bytes().endswith(b"\n"):
            store.append_text(out, "\n")
    return done


def sample(plan: Plan, server: Server, out: Path, parallel: int = 8) -> int:
    """Complete the file; how many rationales are new.

    Raises:
        UsageError: the file holds something else.
        MissingInput, DataError: see ``Server.complete``; what had come in before is kept.
    """
    done, new = open_file(out, plan), 0
    pool = ThreadPoolExecutor(parallel)
    try:
        for rows in pool.map(lambda i: plan.rationales(server, i), range(done, len(plan.problems))):
            store.append_text(out, "".join(rationale_line(r) + "\n" for r in rows))
            new += len(rows)
            if sys.stderr.isatty():
                print(f"\r{done + new // len(rows)}/{len(plan.problems)} problems", end="", file=sys.stderr)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return new


def parser() -> argparse.ArgumentParser:
    """The options."""
    first, _, rest = str(__doc__).partition("\n")
    p = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--recipe", "-r", required=True, help="built-in recipe or a YAML file")
    p.add_argument("--server", required=True, metavar="URL", help="for instance http://127.0.0.1:8000")
    p.add_argument("--out", type=Path, default=Path("rollouts.jsonl"), help="default: %(default)s")
    p.add_argument("--problems", type=int, metavar="N", help="default: each training problem once")
    p.add_argument("--model", help="the server's name for the model (default: the recipe's model.name)")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a recipe key")
    p.add_argument("--seed", type=int, help="shorthand for --set run.seed=N")
    p.add_argument("--parallel", type=int, default=8, metavar="N", help="requests at once (%(default)s)")
    p.add_argument("--retries", type=int, default=5, metavar="N", help="of each request (%(default)s)")
    p.add_argument("--timeout", type=float, default=600.0, metavar="S", help="of each request (%(default)s)")
    p.add_argument("--extra", default=EXTRA, metavar="JSON", help="more fields of each request (%(default)s)")
    p.add_argument("--api-key-env", metavar="NAME", help="environment variable that holds the key")
    return p


def run(a: argparse.Namespace) -> str:
    """What the options ask for; a line that says what was done.

    Raises:
        EmpgError: see ``sample`` and ``make_plan``.
    """
    if not a.server.startswith(("http://", "https://")):
        raise UsageError("the server's address begins with http:// or https://", f"--server {a.server}")
    for name in ("problems", "parallel"):
        if (value := getattr(a, name)) is not None and value < 1:
            raise UsageError("a number of at least 1 is needed", f"--{name} {value}")
    if a.retries < 0 or not a.timeout > 0:
        raise UsageError("retries are 0 or more, a time-out is more than 0 s", "--retries, --timeout")
    try:
        extra = json.loads(a.extra)
        assert isinstance(extra, dict)
    except (ValueError, AssertionError):
        raise UsageError("not a JSON object", f"--extra {a.extra}") from None
    if a.api_key_env and not os.environ.get(a.api_key_env):
        raise UsageError("no such environment variable", f"--api-key-env {a.api_key_env}", "export it")
    key = os.environ[a.api_key_env] if a.api_key_env else None
    url = a.server.rstrip("/").removesuffix("/v1")
    plan = make_plan(load_recipe(a.recipe, a.set, a.seed), a.problems, a.model, extra)
    new = sample(plan, Server(url, key, a.retries, a.timeout), a.out, a.parallel)
    total = len(plan.problems) * plan.recipe.sampler.samples_per_problem
    return f"{total} rationales in {a.out} ({new} new)"


def main(argv: list[str] | None = None) -> int:
    """Exit codes are those of `empg-lite`."""
    arguments = parser().parse_args(argv)
    try:
        try:
            print(run(arguments))
        except KeyboardInterrupt:
            raise Interrupted(2, "interrupted", str(arguments.out), "repeat the command to go on") from None
    except EmpgError as error:
        print(f"error: {' '.join(safe(str(error)).split())}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not sys.exit, which would wait for the requests that are still out
