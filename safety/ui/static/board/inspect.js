// Pointing at a token, or at its place in the trace, or walking with the arrow keys: one place is lit in both, and the
// inspector between them says how likely the token was, what else the model might have said, and what happened there.
const HINT = `${matchMedia('(hover: none)').matches ? 'Tap' : 'Point at'} a word or the trace: its chance, runners-up, events.`;

function inspectable(column) {
  const {body, plot, text} = column;
  html('span', 'hint', column.inspector, HINT);
  body.addEventListener('mouseover', event => {
    const token = event.target.closest('.token');
    if (token) light(column, Number(token.dataset.i));
  });
  plot.addEventListener('mousemove', event => {
    const box = plot.getBoundingClientRect();  // may be zoomed on very large screens
    if (column.at) light(column, Math.max(0, column.at((event.clientX - box.left) * column.width / box.width)), true);
  });
  for (const node of [body, plot]) {
    node.addEventListener('mouseleave', () => { if (document.activeElement !== text) light(column, null); });
  }
  text.addEventListener('keydown', event => {
    const last = column.spans.length - 1, at = column.lit;
    const next = {ArrowRight: at === null ? 0 : at + 1, ArrowLeft: at === null ? last : at - 1, Home: 0, End: last}[event.key];
    if (event.key === 'Escape') light(column, null);
    if (next === undefined || event.target !== text) return;
    event.preventDefault();
    column.inspector.setAttribute('aria-live', 'polite');
    light(column, Math.min(last, Math.max(0, next)), true);
  });
  text.addEventListener('blur', () => {
    column.inspector.removeAttribute('aria-live');
    light(column, null);
  });
}

function light(column, index, follow = false) {
  const {spans, spot, cursor, lane} = column;
  if (column.lit !== null && spans[column.lit]) spans[column.lit].classList.remove('lit');
  const token = index === null ? undefined : spans[Math.min(index, spans.length - 1)];
  column.lit = token ? Number(token.dataset.i) : null;
  if (!token) {
    for (const node of [spot, cursor]) if (node) node.setAttribute('visibility', 'hidden');
    if (!column.inspector.querySelector('.hint')) column.inspector.replaceChildren(html('span', 'hint', null, HINT));
    return;
  }
  const i = column.lit, harm = lane.harm[i];
  token.classList.add('lit');
  if (follow) {  // scroll the answer, never the page
    const inner = token.getBoundingClientRect(), outer = column.text.getBoundingClientRect();
    if (inner.top < outer.top) column.text.scrollTop -= outer.top - inner.top;
    else if (inner.bottom > outer.bottom) column.text.scrollTop += inner.bottom - outer.bottom;
  }
  if (cursor) {
    for (const key of ['x1', 'x2']) cursor.setAttribute(key, column.x(i));
    cursor.setAttribute('visibility', 'visible');
    if (harm !== null) {
      spot.setAttribute('cx', column.x(i));
      spot.setAttribute('cy', column.y(harm));
    }
    spot.setAttribute('visibility', harm === null ? 'hidden' : 'visible');
  }
  describe(column, lane, i);
}

const visible = text => text === '' ? 'end' : text.trim() || (text.includes('\n') ? '⏎' : '␣');

function describe(column, lane, i) {
  const box = column.inspector, line = alarmOf(shown), harm = lane.harm[i], chance = lane.chances[i];
  const covered = lane.covered !== null && i >= lane.covered;
  box.replaceChildren();
  const first = html('div', 'here', box);
  html('span', 'number', first, 'token ' + i);
  html('b', '', first, covered ? 'covered' : visible(lane.tokens[i]));
  if (chance != null) html('span', '', first, 'chance ' + percent(chance));
  if (harm !== null) {
    const over = line !== null && harm >= line;
    html('span', over ? 'alarming' : '', first, `harm ${harm.toFixed(2)}` + (over ? ` ≥ ${line.toFixed(2)}` : ''));
  }
  for (const mark of lane.marks) {
    if (mark.token === i) html('span', 'event', first, markText(mark, marks.of(lane.name, 'sapt')));
  }
  if (i === 0 && lane.badge && lane.badge.p !== null) html('span', 'event', first, badgeText(lane, marks.of(lane.name, 'sasa')));
  const others = (lane.others[i] || []).filter(pair => pair[0] !== lane.tokens[i]).slice(0, 3);
  const second = html('div', 'others', box);
  if (!others.length) return;
  html('span', '', second, 'or');
  for (const [text, p] of others) {
    const other = html('span', 'other', second);
    html('span', '', other, visible(text));
    html('small', '', other, percent(p));
  }
}
