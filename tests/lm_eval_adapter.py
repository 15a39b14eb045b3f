"""Our model, dense or routed, inside lm-evaluation-harness: every task that the harness has, scored row by row without eval.py.

    python tests/lm_eval_adapter.py --model router_tuning --model_args model=DIR,routers=FILE,budget=0.7 --tasks arc_easy --num_fewshot 0
or from Python: lm_eval.simple_evaluate(model=RouterTuningLM(model=DIR, routers=FILE), tasks=["arc_easy"]).  Needs: pip install lm_eval
"""

import sys
from pathlib import Path

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import generate, load_model  # noqa: E402
from tokenizer import load_tokenizer  # noqa: E402


@register_model("router_tuning")
class RouterTuningLM(TemplateLM):
    def __init__(self, model: str, routers: str | None = None, budget: float | None = None, route: str = "gather", device: str = "cpu", batch_size=8, **_):
        super().__init__()
        self.net, self.tok, self.rows = load_model(model, routers, budget, device), load_tokenizer(model), int(batch_size)
        self.route, self.max_length, self._device = route if routers else "off", self.net.config.max_seq_len, torch.device(device)
        self.eot_token_id = self.tok.eos_id
        self.prefix_token_id = self.tok.eos_id if self.tok.bos_id is None else self.tok.bos_id

    eot_token_id = prefix_token_id = None  # abstract in the base class; set per tokenizer

    def tok_encode(self, string, add_special_tokens=None, **_):
        return self.tok.encode(string, bos=self.tok.adds_bos if add_special_tokens is None else add_special_tokens, special=True)

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests, **_):
        order, results = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2])), {}
        for a in range(0, len(order), self.rows):
            batch = [(i, [*requests[i][1], *requests[i][2]][-self.max_length - 1:], requests[i][2]) for i in order[a:a + self.rows]]
            width = len(batch[0][1]) - 1
            tokens = torch.tensor([ids[:-1] + [0] * (width - len(ids) + 1) for _, ids, _ in batch], device=self.device)
            h, _ = self.net.hidden(tokens, lengths=[len(ids) - 1 for _, ids, _ in batch], prompt_lengths=[len(ids) - len(cont) for _, ids, cont in batch],
                                   route=self.route)  # a sequence router sees the context only
            for (i, ids, cont), states in zip(batch, h):
                logits, wanted = self.net.head(states[len(ids) - 1 - len(cont):len(ids) - 1]).log_softmax(-1), torch.tensor(cont, device=self.device)
                results[i] = (logits.gather(1, wanted[:, None]).sum().item(), bool((logits.argmax(-1) == wanted).all()))
        return [results[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        windows = [[(None, *make_disjoint_window(w)) for w in get_rolling_token_windows(self.tok_encode(r.args[0]), self.prefix_token_id, self.max_length, 1)] for r in requests]
        return [sum(score for score, _ in self._loglikelihood_tokens(part)) for part in windows]

    def generate_until(self, requests, disable_tqdm=False):
        texts = []
        for context, settings in (r.args for r in requests):
            new = settings.get("max_gen_toks", 256)
            ids = generate(self.net, [self.tok_encode(context)[-(self.max_length - new):]], new, stop_tokens=self.tok.stop_ids, route=self.route)[0]
            texts.append(self.tok.decode(ids, skip_special=True))
            for stop in settings.get("until", []):
                texts[-1] = texts[-1].split(stop)[0]
        return texts


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate
    cli_evaluate()
