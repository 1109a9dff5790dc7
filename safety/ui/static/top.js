// The head: which model, what is happening to it, and what was measured of its defenses. Everything through textContent.
const find = selector => element.querySelector(selector);

function measuredTable(measured) {
  const box = find('.measured'), body = box.querySelector('div');
  box.hidden = !measured;
  body.replaceChildren();
  if (!measured) return;
  html('p', '', body, 'Requests that calibration never saw, and how many of them each column refused. A good defense refuses the attacks and answers their twins.'
    + (measured.label ? ` Measured in ${measured.label}; another number format words some answers differently. Beside each count stands its 95 % interval (Wilson's): that is how uncertain so few requests leave it.` : ''));
  const scroll = html('div', 'scroll', body), table = html('table', '', scroll), head = html('tr', '', html('thead', '', table)), rows = html('tbody', '', table);
  scroll.tabIndex = 0;
  scroll.setAttribute('role', 'region');
  scroll.setAttribute('aria-label', 'Refusals measured on held-out requests');
  for (const name of ['Refused', ...measured.lanes]) html('th', '', head, name).scope = 'col';
  for (const {kind, harmless, refused} of measured.rows) {
    const row = html('tr', harmless ? 'harmless' : 'harmful', rows);
    html('th', '', row, `${kind} (${harmless ? 'should be 0' : 'should be all'})`).scope = 'row';
    for (const {count, interval} of refused) html('small', '', html('td', '', row, `${count} `), interval);
  }
}

let folders = '', measuredShown = '', dismissed = '';  // dismissed: the failure that the visitor has read
function draw() {
  const now = props.value, status = find('.model-status'), bar = status.querySelector('progress');
  element.dataset.state = now.state;
  find('.model-name').textContent = now.label || (now.state === 'failed' ? 'none' : 'being loaded');
  const words = status.querySelector('span');
  if (words.textContent !== now.message) words.textContent = now.message;
  if (now.state !== 'failed') dismissed = '';
  status.hidden = !now.message || now.message === dismissed;
  find('.dismiss').hidden = now.state !== 'failed';
  find('.cancel').hidden = now.public || now.state !== 'working' || now.task !== 'Calibrating';
  bar.hidden = now.state !== 'working';
  if (now.fraction === null) bar.removeAttribute('value'); else bar.value = now.fraction;
  const illustrative = now.model === 'miniature' ? 'the miniature model is small and illustrative: do not trust its facts.'
    : 'language models err: do not trust their facts.';
  find('.caution-words').textContent = illustrative + (now.measured && now.measured.sentence ? ` ${now.measured.sentence}` : '');
  const key = JSON.stringify(now.measured);
  if (key !== measuredShown) { measuredShown = key; measuredTable(now.measured); }
  find('.load').hidden = find('.calibrate').hidden = now.public;
  find('.calibrate').hidden ||= !now.model || now.calibrated.length === 3;
  for (const button of element.querySelectorAll('.model-panel button')) button.disabled = now.state === 'working';
  find('.model-made').textContent = !now.model ? 'No model is loaded yet.'
    : now.calibrated.length ? `Calibrated for this model: ${now.calibrated.map(key => now.names[key]).join(', ')}${now.made.date ? ', ' + now.made.date : ''}.`
      : 'Nothing is calibrated for this model yet: only its undefended answer can be shown.';
  if (JSON.stringify(now.folders) !== folders) {
    folders = JSON.stringify(now.folders);
    const select = find('[name=artifacts]');
    select.replaceChildren();
    html('option', '', select, 'those shipped for it').value = '';
    for (const [path, name] of now.folders) html('option', '', select, name).value = path;
  }
}
for (const [form, event] of [['load', 'switch'], ['calibrate', 'calibrate']]) {
  find('form.' + form).addEventListener('submit', submitted => {
    submitted.preventDefault();
    find('.model').open = false;  // how it goes is told below it
    trigger(event, Object.fromEntries(new FormData(submitted.target)));
  });
}
find('.cancel').addEventListener('click', () => trigger('cancel', {}));
find('.dismiss').addEventListener('click', () => { dismissed = props.value.message; draw(); find('.model summary').focus(); });
element.addEventListener('keydown', event => {
  if (event.key !== 'Escape' || !find('.model').open) return;
  find('.model').open = false;
  find('.model summary').focus();
});
watch('value', draw);
draw();
