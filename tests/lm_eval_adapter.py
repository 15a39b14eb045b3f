"""Our model, dense or routed, inside lm-evaluation-harness: every task that the harness has, row by row and without eval.py.
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
    eot_token_id = prefix_token_id = None  # properties of the base class; set from the tokenizer

    def __init__(self, model, routers=None, budget=None, route="gather", device="cpu", batch_size=8, max_length=None, **_):
        super().__init__()
        self.net, self.tok, self._device = load_model(model, routers, budget, device), load_tokenizer(model), torch.device(device)
        self.route, self.rows, self.max_length = route if routers else "off", int(batch_size), max_length or self.net.config.max_seq_len
        self.eot_token_id, self.prefix_token_id = self.tok.eos_id, self.tok.eos_id if self.tok.bos_id is None else self.tok.bos_id

    def tok_encode(self, string, add_special_tokens=None, **_):
        return self.tok.encode(string, bos=self.tok.adds_bos if add_special_tokens is None else add_special_tokens, special=True)

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests, **_):
        rows, results = [([*context, *new][-self.max_length - 1:], new) for _, context, new in requests], [None] * len(requests)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
        for batch in (order[a:a + self.rows] for a in range(0, len(order), self.rows)):
            lengths, width = [len(rows[i][0]) - 1 for i in batch], len(rows[batch[0]][0]) - 1
            tokens = torch.tensor([rows[i][0][:-1] + [0] * (width - n) for i, n in zip(batch, lengths)], device=self.device)
            prompts = [n + 1 - len(rows[i][1]) for i, n in zip(batch, lengths)]  # a sequence router sees the context only
            h, _ = self.net.hidden(tokens, lengths=lengths, prompt_lengths=prompts, route=self.route)
            for i, states, prompt, length in zip(batch, h, prompts, lengths):
                logits, new = self.net.head(states[prompt - 1:length]).log_softmax(-1), torch.tensor(rows[i][1], device=self.device)
                results[i] = logits.gather(1, new[:, None]).sum().item(), bool((logits.argmax(-1) == new).all())
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        cut = [get_rolling_token_windows(self.tok_encode(r.args[0]), self.prefix_token_id, self.max_length, 1) for r in requests]
        return [sum(score for score, _ in self._loglikelihood_tokens([(None, *make_disjoint_window(w)) for w in ws])) for ws in cut]

    def generate_until(self, requests, disable_tqdm=False):
        def answer(context, settings):
            new, text = settings.get("max_gen_toks", 256), self.tok_encode(context)
            ids = generate(self.net, [text[new - self.max_length:]], new, stop_tokens=self.tok.stop_ids, route=self.route)[0]
            text = self.tok.decode(ids, skip_special=True)
            return min((text.split(stop)[0] for stop in settings.get("until", [])), key=len, default=text)
        return [answer(*request.args) for request in requests]


if __name__ == "__main__":
    __import__("lm_eval.__main__").__main__.cli_evaluate()
