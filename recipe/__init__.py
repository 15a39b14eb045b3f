"""What the default recipe measures, fits, orders, calibrates and compares with.

1. Price each unit by its Fisher cost: the second-order KL of leaving it out (measure). auto:N routes the N cheapest.
2. Search orders in which places are best skipped for everyone: greedily by loss, by cost, by similarity, and by weights
   alone (orders).
3. Fit routers in closed form to what each place is worth to each sequence, mixed with a static order as far as it must
   be so that sources left out of the fit lose nothing by it; or to each token's cost (measure, fit).
4. Move the logits by ridge steps, with a running quantile as the cut; keep the best router (fit, train.py).
5. Calibrate cuts for every budget; where a static list wins, the table holds it (calibrate, controls).

Around the loop of train.py stand settings, check (those that cannot be), places (those that settings name, and routes
by lists and chance), run (what steps work on), start (how they begin), needs (what a run will take), checkpoint (how it
goes on) and finish (calibration, files, the summary).

What routers of experts need beside that stands in experts. FLOPs, bytes and ceilings stand in cost, passes over
examples in passes, those of static lists, which share layers, in lists, stored activations in trunk, answers of phases
in journal, timings in speed, what is printed in report. forced, fidelity and results serve eval.py: routes by
--control, distances from the dense model, and what its records say; hold keeps a budget within each sequence. lora,
adapter, fixed, int8 and shard change the base itself: LoRA, its files, fixed routes built in, a byte a weight, blocks
shared out over ranks; base loads and writes what comes of it.
Nothing here imports a script.
"""
