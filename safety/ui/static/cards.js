// One-click examples: each card fills the form; its round button runs it at once as well.
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-index]');
  if (!button) return;
  const detail = {index: Number(button.dataset.index)};
  if (button.classList.contains('card-run')) trigger('play', detail);
  else trigger('pick', detail);
});
