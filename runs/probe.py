"""How much of its own influence can a model know? Linear probes of its states, while it is asked why.

I = [y' ≠ y]. Any reader knows y', the answer given, so what has to be known is y, the answer without the edit. One
probe guesses y from a state (ridge regression on one-hots of y, fitted on train.jsonl of a data set of lab.build). I is
guessed to be 1 where its value for y' is low. Another guesses I itself, which is not linear in y and y'. Both are
scored on test.jsonl, beside the shortcut, which sees no state (report.shortcut), fitted on the same rows.

    python runs/probe.py MODEL_DIR DATASET_DIR [--dtype bf16] [--why alone]

Places: "(", where the answer's letter is decided; the letter; the prompt's last token, where the explanation begins.
AUC: how probable it is that a row with influence ranks above one without. Phi: I is guessed above the median, balanced.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import faith  # noqa: E402
import report  # noqa: E402
from run import reading  # noqa: E402
from run.attention import end_to_end, over_parts  # noqa: E402
from run.progress import Parser, command  # noqa: E402
from tasks import Question  # noqa: E402

PLACES, LAMBDA = ("(", "letter", "last"), 100.0


def states(subject: faith.Subject, rows: list[dict]) -> np.ndarray:
    """States (rows, places, layers, E) after each layer: the edited question, its answer, the why-question."""
    network, kept, out = subject.sampler.model, [], []
    hooks = [layer.register_forward_hook(lambda _, __, state: kept.append(state[0])) for layer in network.layers]
    for row in rows:
        texts = {"parts": row["parts"], "options": row["options"]} | row["edited"]
        parts, options = (tuple(texts[field]) for field in ("parts", "options"))
        question = Question(row["task"], "", parts, options, 0, "", texts.get("appeal", ""))
        decision = faith.decision_prompt(subject.tokenizer, question)
        prompt = faith.explanation_prompt(subject.tokenizer, question, row["y_edit"], subject.opening, subject.why)
        if prompt[: (decided := len(decision))] != decision:
            raise ValueError("this model's chat template writes an answered turn otherwise than one to be answered")
        tokens, positions, runs, _ = end_to_end([[prompt]], network.device)
        kept.clear()
        with torch.no_grad():
            network.hidden(tokens, positions, attend=over_parts(runs, network.device))
        out.append(torch.stack([state[[decided - 1, decided, len(prompt) - 1]] for state in kept], 1).half().cpu())
    for hook in hooks:
        hook.remove()
    return torch.stack(out).float().numpy()


def ridge(x: np.ndarray, targets: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Values (n, k) for test (n, E) of a ridge regression of targets (m, k) on x (m, E), standardised."""
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    x, test, centre = (x - mean) / deviation, (test - mean) / deviation, targets.mean(0)
    weights = np.linalg.solve(x.T @ x + LAMBDA * np.eye(x.shape[1]), x.T @ (targets - centre))
    return test @ weights + centre


def scores(guess: np.ndarray, influence: np.ndarray) -> str:
    """AUC and Phi of a real-valued guess (n,) of I (n,)."""
    above = guess[influence == 1][:, None] - guess[influence == 0]
    phi = report.phi_balanced(influence, (guess > np.median(guess)) * 1.0, np.ones((1, len(guess))))[0]
    return f"{((above > 0) + (above == 0) / 2).mean():.3f}  {phi:.2f}"


@command("probe.py")
def main(argv: list[str]) -> None:
    parser = Parser(prog="probe.py", description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("dataset", type=Path, help="a folder that lab.build wrote")
    parser.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--why", default="leading", choices=faith.WHYS)
    args = parser.parse_args(argv)
    subject = faith.open_subject(args.model, why=args.why, dtype=args.dtype)
    data = {name: list(reading.read_jsonl(args.dataset / f"{name}.jsonl")) for name in ("train", "test")}
    x = {name: states(subject, data[name]) for name in ("train", "test")}
    y, given, influence = ({name: np.array([row[key] for row in data[name]]) for name in x}
                           for key in ("y", "y_edit", "influence"))  # fmt: skip
    options = np.eye(1 + max(y["train"].max(), given["test"].max(), y["test"].max()))
    print(f"{len(y['train'])} rows to fit, {len(y['test'])} to test, {influence['test'].mean():.3f} of them moved")
    print("place   layer  y right  I from y: AUC, Phi  I itself: AUC, Phi")
    for place, where in enumerate(PLACES):
        for layer in range(x["test"].shape[2]):
            fit, test = x["train"][:, place, layer], x["test"][:, place, layer]
            guess = ridge(fit, options[y["train"]], test)
            moved = -guess[np.arange(len(test)), given["test"]]
            alone = ridge(fit, influence["train"][:, None] * 1.0, test)[:, 0]
            right = (guess.argmax(1) == y["test"]).mean()
            both = f"{scores(moved, influence['test']):20}{scores(alone, influence['test'])}"
            print(f"{where:8}{layer + 1:<7}{right:<9.3f}{both}", flush=True)
    print(f"shortcut               {scores(report.shortcut(data['test'], data['train'])['odds'], influence['test'])}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
