"""Our engine as a model of lm-evaluation-harness, which is an optional package.

Requests that share a prefix are computed once; the results are those of the harness's own Hugging
Face backend.
"""
import itertools
import math
from concurrent.futures import ThreadPoolExecutor

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from engine.likelihood import (
    encode,
    fit_to_context,
    group_by_prefix,
    log_likelihoods,
    rolling_windows,
)

PARALLEL_TEXTS = 32  # generated at a time


class HarnessModel(TemplateLM):
    """Answers the harness's requests with a `generate.Engine`.

    TemplateLM tokenizes a context together with its continuation, as the Hugging Face backend does.
    """

    def __init__(self, engine, batch_tokens: int | None = None):
        super().__init__()
        self.engine = engine
        self.batch_tokens = batch_tokens

    @property
    def eot_token_id(self) -> int:
        """The id that stands in for an empty context and precedes a text."""
        return self.engine.empty_prompt()[-1]

    def tok_encode(self, string: str, add_special_tokens=None, **_) -> list[int]:
        return encode(self.engine.tokenizer, string)

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding yields it) of each continuation.

        A request is (texts, ids of the context, ids of the continuation).
        """
        block_size = self.engine.block_size
        members, items = [], []  # the requests of each item
        fitting, pairs = [], []
        for i, (_, context, continuation) in enumerate(requests):
            parts = fit_to_context(context, [continuation], self.engine.tokenizer, block_size)
            if len(parts) == 1:
                fitting.append(i)
                pairs.append((parts[0].context, continuation))
            else:  # a continuation that is longer than the model's context
                members.append([i])
                items.append(parts)
        for group in group_by_prefix(pairs, max_tokens=2 * block_size):
            members.append([fitting[i] for i in group.indices])
            items.append([group._replace(indices=list(range(len(group.indices))))])

        results = [None] * len(requests)
        for item, likelihoods in self.score(items, total=len(requests)):
            for i, likelihood in zip(members[item], likelihoods):
                results[i] = tuple(likelihood)
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, in windows that do not overlap."""
        block_size = self.engine.block_size
        items = []
        for request in requests:
            ids = [self.prefix_token_id, *self.tok_encode(request.args[0])]
            items.append(list(rolling_windows(ids, 1, block_size, stride=block_size)))
        results = [0.0] * len(requests)
        for i, likelihoods in self.score(items, total=len(requests)):
            results[i] = sum(likelihood.logprob for likelihood in likelihoods)
        return results

    def score(self, items: list, total: int):
        """`log_likelihoods` of the items, with a progress bar over `total` requests."""
        vocab_size = self.engine.tokenizer.vocab_size
        with tqdm(total=total, unit="request") as progress:
            for item, likelihoods in log_likelihoods(self.engine.packed, vocab_size, items,
                                                     self.batch_tokens):
                yield item, likelihoods
                progress.update(len(likelihoods))

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        self.engine.scheduler.deadline_s = math.inf  # a slow machine must not cut a text short
        with ThreadPoolExecutor(PARALLEL_TEXTS) as pool:
            # a task can repeat a request to sample several texts, so each has its own seed
            texts = pool.map(self.continue_prompt, requests, itertools.count())
            return list(tqdm(texts, total=len(requests), unit="text"))

    def continue_prompt(self, request, seed: int) -> str:
        """The continuation of a prompt until a stop string, greedy unless the task samples."""
        prompt, options = request.args
        options = normalize_gen_kwargs(options)
        # leave room for the answer, as the Hugging Face backend does
        block_size = self.engine.block_size
        max_new_tokens = min(options["max_gen_toks"], block_size - 1)
        ids = self.tok_encode(prompt)[-(block_size - max_new_tokens):] or [self.prefix_token_id]
        (text,) = self.engine.generate(
            ids, max_new_tokens=max_new_tokens, temperature=options.get("temperature", 0.0),
            top_p=options.get("top_p", 1.0), stop=tuple(filter(None, options["until"])), seed=seed)
        return text
