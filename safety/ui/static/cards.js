// One-click examples: each card fills the form; its round button runs it at once, its film strip plays a recording.
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-index]');
  if (!button) return;
  const detail = {index: Number(button.dataset.index)};
  for (const card of element.querySelectorAll('.card-fill')) {
    const its = String(card.dataset.index === button.dataset.index);
    card.setAttribute('aria-pressed', its);
    card.dataset.pictured = its;  // the form's picture is this example's: links say so
  }
  if (button.classList.contains('card-run')) trigger('play', detail);
  else if (button.classList.contains('card-replay')) trigger('replay', detail);
  else trigger('pick', detail);
});

// Another prompt or picture is no longer the example's.
for (const kind of ['input', 'change', 'click']) {
  document.addEventListener(kind, event => {
    const other = kind === 'click' ? '#image button' : kind === 'input' ? '#prompt textarea' : '#image input';
    if (event.isTrusted && event.target.closest?.(other)) {
      for (const card of element.querySelectorAll('.card-fill')) {
        card.setAttribute('aria-pressed', 'false');
        if (kind !== 'input') card.dataset.pictured = 'false';
      }
    }
  });
}
