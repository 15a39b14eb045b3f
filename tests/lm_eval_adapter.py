"""Our model, dense or routed, inside lm-evaluation-harness: every task that it has, row by row and without eval.py.

    python tests/lm_eval_adapter.py --model router_tuning --model_args model=DIR,routers=FILE,budget=0.7 \
        --tasks arc_easy --num_fewshot 0

or from Python: lm_eval.simple_evaluate(model=RouterTuningLM(model=DIR, routers=FILE), tasks=["arc_easy"]).
Needs: pip install lm_eval
"""

import sys
from pathlib import Path

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import generate, load_model, pad  # noqa: E402
from tokenizer import encode_chat, load_tokenizer  # noqa: E402


@register_model("router_tuning")
class RouterTuningLM(TemplateLM):
    """Settings are those of --model_args; route, batch_size and max_length may stand among them."""

    eot_token_id = prefix_token_id = None  # properties of the base class; set from the tokenizer
    tokenizer_name = "router_tuning"

    def __init__(self, model, routers=None, budget=None, device="cpu", **settings):
        super().__init__()
        self.net, self.tok = load_model(model, routers, budget, device), load_tokenizer(model)
        self._device = torch.device(device)
        self.route = settings.get("route", "gather") if routers else "off"
        self.rows = int(settings.get("batch_size", 8))
        self.max_length = settings.get("max_length") or self.net.config.max_seq_len
        self.eot_token_id = self.tok.eos_id
        self.prefix_token_id = self.tok.eos_id if self.tok.bos_id is None else self.tok.bos_id

    def tok_encode(self, string, add_special_tokens=None, **_):
        begins = self.tok.bos_id is not None and string.startswith(self.tok.decode([self.tok.bos_id]))
        bos = self.tok.adds_bos and not begins if add_special_tokens is None else add_special_tokens
        return self.tok.encode(string, bos=bos, special=True)

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return self.tok.decode(encode_chat(self.tok, chat_history, generate=add_generation_prompt)[0])

    def chat_template(self, name=False):
        return "the model's own"

    def _loglikelihood_tokens(self, requests, **_):
        rows = [([*context, *new][-self.max_length - 1 :], len(new)) for _, context, new in requests]
        order, results = sorted(range(len(rows)), key=lambda i: -len(rows[i][0])), [None] * len(rows)
        for a in range(0, len(order), self.rows):
            batch = order[a : a + self.rows]
            for i, scored in zip(batch, self.score([rows[i] for i in batch])):
                results[i] = scored
        return results

    @torch.inference_mode()
    def score(self, rows):
        """Log-probability of each row's last tokens (row, n), and whether they are the likeliest ones."""
        lengths = [len(ids) - 1 for ids, _ in rows]
        prompts = [len(ids) - n for ids, n in rows]  # a sequence router sees the context only
        tokens = pad([ids[:-1] for ids, _ in rows], self._device)
        h, _ = self.net.hidden(tokens, lengths=lengths, prompt_lengths=prompts, route=self.route)
        found = []
        for (ids, n), states, prompt, length in zip(rows, h, prompts, lengths):
            logits = self.net.head(states[prompt - 1 : length]).log_softmax(-1)
            new = torch.tensor(ids[-n:], device=self._device)
            found.append((logits.gather(1, new[:, None]).sum().item(), bool((logits.argmax(-1) == new).all())))
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        totals = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            rows = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(rows)))
        return totals

    def generate_until(self, requests, disable_tqdm=False):
        return [self.answer(*request.args) for request in requests]

    def answer(self, context, settings):
        new, prompt = settings.get("max_gen_toks", 256), self.tok_encode(context)
        prompt = prompt[new - self.max_length :]
        ids = generate(self.net, [prompt], new, stop_tokens=self.tok.stop_ids, route=self.route)[0]
        text = self.tok.decode(ids, skip_special=True)
        return min((text.split(stop)[0] for stop in settings.get("until", [])), key=len, default=text)


if __name__ == "__main__":
    __import__("lm_eval.__main__").__main__.cli_evaluate()
