"""What the page says, as trusted static markup. Nothing a visitor or a model wrote passes through here."""

import html

TITLE = "Safety, side by side"

_MARK = (
    '<svg class="mark" viewBox="0 0 40 40" aria-hidden="true"><rect width="40" height="40" rx="10" class="mark-back"/>'
    '<path class="mark-open" d="M8 27c4-1 5-14 9-15"/><path class="mark-closed" d="M17 12c4-1 5 13 15 13"/>'
    '<path class="mark-threshold" d="M7 16.5H33"/><path class="mark-inject" d="M14 33h7l-3.5-6Z"/></svg>'
)

FOOTER = (
    "<p>Methods: SASA (<a href='https://arxiv.org/abs/2507.21637'>arXiv 2507.21637</a>), activation revision "
    "(<a href='https://arxiv.org/abs/2501.16378'>arXiv 2501.16378</a>), SAPT "
    "(<a href='https://arxiv.org/abs/2506.15734'>arXiv 2506.15734</a>). "
    "For research on model safety: nothing shown here is advice.</p>"
)

NOTICE = '<div class="notice" role="alert" hidden><strong>That did not work.</strong> <span></span></div>'
NOTICE_SCRIPT = """
const box = element.querySelector('.notice');
const show = () => { box.querySelector('span').textContent = props.value || ''; box.hidden = !props.value; };
watch('value', show); show();
"""

ORDER_SCRIPT = """
const steps = element.querySelectorAll('li'), none = element.querySelector('.order-none');
const show = () => {
  const on = props.value || [];
  steps.forEach((step, i) => step.classList.toggle('off', !on[i]));
  none.hidden = on.some(Boolean);
};
watch('value', show); show();
"""

ORDER = (
    '<div class="order"><h2 class="section">Who acts when, in a defended answer</h2><ol>'
    '<li class="order-sasa"><b>SASA</b> judges the request once. It refuses, or lets the model answer untouched.</li>'
    '<li class="order-revision"><b>Revision</b> then nudges every step of the answer towards safety.</li>'
    '<li class="order-sapt"><b>SAPT</b> watches as it is written; alarmed, it injects a reminder. '
    "Revision stays on.</li>"
    "</ol><p class='order-none' hidden>No defense is on: only the undefended answer will run.</p></div>"
)

_EXPLANATIONS = (
    (
        "sasa",
        "SASA",
        "before the first word",
        "Inside the model, an early “safety” block and a later block that has understood the request look at it "
        "differently. SASA projects the early block’s state onto the later one, so that safety gets to see what "
        "the request means, then a small probe reads off how harmful it is. At or above the threshold the "
        "answer is a refusal; below it the model answers exactly as it would have undefended.",
    ),
    (
        "revision",
        "Activation revision",
        "at every step",
        "From pairs of safe and unsafe answers to the same question one learns a direction in the model’s inner "
        "state that points from unsafe to safe. Revision adds a little of it (α) at one block, at every step. "
        "Too little changes nothing, too much makes the model babble: the slider shows both.",
    ),
    (
        "sapt",
        "SAPT, the safety reminder",
        "in mid-sentence",
        "Four trained “soft” tokens, which are no words, are slipped in behind what was written so far. A detector "
        "reads the state they produce. Not alarmed, they are taken out as if nothing had happened; alarmed, they "
        "stay, and the model turns to a refusal from there. What was already written stays visible and counts.",
    ),
    (
        "trace",
        "The trace",
        "under every answer",
        "A small detector estimates, for every token, how likely the answer so far is turning harmful. It only "
        "watches, the undefended column too. It can be wrong both ways: read it as evidence, not as a verdict.",
    ),
)


def header(model: str) -> str:
    """Title, purpose, loaded model and the notice about what may be seen."""
    return (
        f'<header class="top"><div class="brand">{_MARK}<div><h1>{TITLE}</h1>'
        "<p>One vision-language model answers you undefended and defended at once. "
        "Watch where harm shows, and which defense steps in.</p></div></div>"
        f'<p class="model"><span>Model</span> {html.escape(model)}</p></header>'
        f'<p class="caution" role="note"><b>Please note:</b> {caution(model)} '
        "The undefended answer may be unsafe: that is what is being shown.</p>"
    )


def caution(model: str) -> str:
    """What to expect of the loaded model."""
    if model.startswith("miniature"):
        return "the miniature model is small and illustrative. Compare the columns; do not trust its facts."
    return "language models err. Compare the columns; do not trust their facts."


def explanations() -> str:
    """A plain paragraph for each defense and for the trace."""
    cards = "".join(
        f'<section class="explain explain-{key}"><h3>{name} <small>{when}</small></h3><p>{words}</p></section>'
        for key, name, when, words in _EXPLANATIONS
    )
    return f'<div class="explanations">{cards}</div>'
