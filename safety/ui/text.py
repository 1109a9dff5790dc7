"""Small pieces of the page: its name, its mark, and the notice beside the Run button."""

TITLE = "Safety, side by side"

MARK = (
    '<svg class="mark" viewBox="0 0 40 40" aria-hidden="true"><rect width="40" height="40" rx="10" class="mark-back"/>'
    '<path class="mark-open" d="M8 27c4-1 5-14 9-15"/><path class="mark-closed" d="M17 12c4-1 5 13 15 13"/>'
    '<path class="mark-threshold" d="M7 16.5H33"/><path class="mark-inject" d="M14 33h7l-3.5-6Z"/></svg>'
)

NOTICE = '<div class="notice" role="alert" hidden></div>'
NOTICE_SCRIPT = """
const box = element.querySelector('.notice');
const show = () => { box.textContent = props.value || ''; box.hidden = !props.value; };
watch('value', show); show();
"""
