"""What the live page asks of a model, as plain values in and out; no web in here.

Requests take turns: one at a time uses the model, and a newer one makes the older stop before its next token.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from unbraid.errors import FeatureError
from unbraid.feature_model.commands import describe, parse_metric
from unbraid.feature_model.dictionaries import split_address
from unbraid.feature_model.edits import Steer
from unbraid.feature_model.tables import visible

MOST_TOKENS, MOST_EDITS, MOST_CHARACTERS, MOST_PROMPT_TOKENS = 256, 16, 8000, 512
FEATURES_PER_TOKEN, PARTNERS, BARS, CONTEXTS = 12, 5, 10, 6


class Turns:
    """Who may use the model."""

    def __init__(self) -> None:
        self._lock, self._newest, self._count = threading.Lock(), 0, threading.Lock()

    def take(self) -> Callable[[], bool]:
        """A turn: says whether it has been overtaken. Whoever holds an older turn stops soon."""
        with self._count:
            self._newest += 1
            mine = self._newest
        return lambda: mine != self._newest

    @contextmanager
    def held(self, overtaken: Callable[[], bool]) -> Iterator[None]:
        """The model is this turn's while the block lasts.

        Raises:
            Overtaken: a newer request came while this one waited.
        """
        with self._lock:
            if overtaken():
                raise Overtaken
            yield


class Overtaken(Exception):
    """A newer request has taken the model."""


class Session:
    """A model behind the page.

    Args:
        fm: the model.
        run: how the run was named, for the code the page gives.
    """

    def __init__(self, fm: Any, run: str):
        self.fm, self.run, self.turns = fm, run, Turns()
        self._plain: dict[tuple[Any, ...], str] = {}

    def about(self, body: dict[str, Any]) -> dict[str, Any]:
        """The run and its dictionaries."""
        return {
            "run": self.run,
            "model": type(self.fm.hf_model).__name__,
            "dictionaries": [
                {"name": one.name, "site": one.site, "features": one.n_features, "twin": self.fm.twins.get(one.name)}
                for one in self.fm.dictionaries.values()
            ],
            "limits": {"tokens": MOST_TOKENS, "edits": MOST_EDITS},
        }

    def read(self, body: dict[str, Any]) -> dict[str, Any]:
        """Tokens of a prompt with the strongest features of each."""
        reading = self.fm.read(self._prompt(body))
        if self.fm.has_held_out:
            _ = self.fm.held_out.maxima
        tokens = []
        for token, text in enumerate(reading.tokens[0]):
            found = []
            for name, features in reading.of_token(0, token, FEATURES_PER_TOKEN).items():
                for address, code in features:
                    index = int(address.rpartition("/")[2])
                    share, words = self.fm.share(name, index, code), self.fm.words(name, index)
                    found.append({"feature": address, "code": code, "share": share, "words": words})
            errors = {name: float(error[0, token]) for name, error in reading.error.items()}
            tokens.append({"text": text, "features": found, "error": errors, "read": bool(reading.read_BT[0, token])})
        return {"tokens": tokens}

    def feature(self, body: dict[str, Any]) -> dict[str, Any]:
        """One feature: words, largest code, contexts, partners and the twin's counterpart."""
        feature = self.fm.feature(wanted(body, "feature", str))
        address = str(feature)
        pairs = self.fm.pairs(address, PARTNERS)
        contexts = self.fm.contexts(address, CONTEXTS).to_dict()
        words = self.fm.words(*split_address(address))
        return {"feature": address, "words": words, "partners": pairs.rows, "counterpart": pairs.counterpart} | {
            "largest": contexts["largest"],
            "fires": contexts["fires"],
            "rows": contexts["rows"],
            "contexts": contexts["contexts"],
        }

    def attribute(self, body: dict[str, Any]) -> dict[str, Any]:
        """Contributions to a metric, with error, bias and gap."""
        prompt = self._prompt(body)
        metric = parse_metric(self.fm, prompt, wanted(body, "metric", str, "") or None)
        name = wanted(body, "sae", str, "") or None
        method = wanted(body, "method", str, "gradient")
        found = self.fm.attribute(prompt, metric, method=method, sites=None if name is None else [name])
        data = found.to_dict()
        data["contributions"] = found.top(20).rows
        code = f"fm.attribute({prompt!r}, {_metric_code(metric)}, method={method!r})"
        return data | {"described": describe(self.fm, metric), "python": self._python(code)}

    def steer(self, body: dict[str, Any], stopped: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        """Next-token bars, plain text, steered text, then what the partners did; a piece at a time."""
        prompt, edits = self._prompt(body), self._edits(body)
        tokens = wanted(body, "tokens", int, 40)
        if not 1 <= tokens <= MOST_TOKENS:
            raise FeatureError(f"tokens is {tokens}; expected 1 to {MOST_TOKENS}")
        temperature, seed = float(wanted(body, "temperature", float, 0.0)), wanted(body, "seed", int, 0)
        if not 0 <= temperature <= 5:
            raise FeatureError(f"temperature is {temperature}; expected 0 to 5")
        sampling: dict[str, Any] = {"do_sample": temperature > 0}
        sampling |= {"temperature": temperature} if temperature > 0 else {}
        effect = self.fm.run(prompt, edits)
        yield {"kind": "next", "rows": self._bars(effect), "kl": float(effect.kl.mean())}
        made = self.fm.generate(prompt, edits, max_new_tokens=tokens, seed=seed, stream=True, **sampling)
        key = (prompt, tokens, temperature, seed)
        if key in self._plain:
            yield {"kind": "plain", "text": self._plain[key]}
        else:
            pieces = []
            for piece in made.pieces(edited=False, stopped=stopped):
                pieces.append(piece)
                yield {"kind": "plain", "text": piece}
            if not stopped():
                self._plain = {key: "".join(pieces)}
        for piece in made.pieces(stopped=stopped):
            yield {"kind": "steered", "text": piece}
        if stopped():
            return
        partners = effect.partners.rows if edits else []
        moved = effect.moved(8).rows if edits else []
        steered = ", ".join(_edit_code(edit) for edit in edits)
        options = "".join(f", {name}={value!r}" for name, value in sampling.items())
        code = f"fm.generate({prompt!r}, [{steered}], max_new_tokens={tokens}, seed={seed}{options}).text"
        yield {"kind": "effect", "partners": partners, "moved": moved, "python": self._python(code)}

    def _bars(self, effect: Any) -> list[dict[str, Any]]:
        """The likeliest next tokens of either distribution."""
        plain_V, steered_V = (one[0, -1].float().softmax(-1) for one in (effect.plain_logits, effect.logits))
        likeliest = torch.maximum(plain_V, steered_V).topk(min(BARS, len(plain_V))).indices.tolist()
        decode = self.fm.tokenizer.decode
        return [
            {"token": decode([token]), "plain": float(plain_V[token]), "steered": float(steered_V[token])}
            for token in likeliest
        ]

    def _prompt(self, body: dict[str, Any]) -> str:
        prompt = wanted(body, "prompt", str)
        if not prompt or len(prompt) > MOST_CHARACTERS:
            raise FeatureError(f"the prompt has {len(prompt):,} characters; expected 1 to {MOST_CHARACTERS:,}")
        length = self.fm.prompt(prompt).tokens_BT.shape[1]
        if length > MOST_PROMPT_TOKENS:
            raise FeatureError(f"the prompt has {length} tokens; expected at most {MOST_PROMPT_TOKENS}")
        return prompt

    def _edits(self, body: dict[str, Any]) -> list[Steer]:
        given = wanted(body, "edits", list, [])
        if len(given) > MOST_EDITS or not all(isinstance(one, dict) for one in given):
            raise FeatureError(f"{len(given)} edits; expected at most {MOST_EDITS} objects")
        edits = []
        for one in given:
            without = wanted(one, "without", list, [])
            if len(without) > MOST_EDITS or not all(isinstance(address, str) for address in without):
                raise FeatureError(f"without has {len(without)} entries; expected at most {MOST_EDITS} addresses")
            edits.append(Steer(wanted(one, "feature", str), float(wanted(one, "by", float)), without=tuple(without)))
        return edits

    def _python(self, code: str) -> str:
        return f"import unbraid\nfrom unbraid import Steer, logit\n\nfm = unbraid.features({self.run!r})\n{code}\n"


def wanted(body: dict[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """A value of a request.

    Raises:
        FeatureError: it is missing or of another kind.
    """
    value = body.get(name, default)
    accepted: Any = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or isinstance(value, bool):
        raise FeatureError(f"{name} is {visible(repr(value))[:80]}; expected {kind.__name__}")
    return value


def _edit_code(edit: Steer) -> str:
    held = f", without={list(edit.without)!r}" if edit.without else ""
    return f"Steer({edit.feature!r}, {edit.by!r}{held})"


def _metric_code(metric: Any) -> str:
    return f"logit({metric.token!r}" + (f", minus={metric.minus!r})" if metric.minus is not None else ")")
