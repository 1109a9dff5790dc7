// One column per lane. The files of this folder are joined, in the order that board.py gives, into one script that
// runs inside gr.HTML: `element`, `props`, `watch` and `trigger` come from Gradio.
// Model text only ever goes through textContent, so markup in it stays text.
const SVG = 'http://www.w3.org/2000/svg';
const STATES = {empty: 'Ready', queued: 'In line', waiting: 'Reading', streaming: 'Writing', done: 'Done', limit: 'Length limit',
                refused: 'Refused', stopped: 'Stopped', error: 'Failed', memory: 'Out of memory'};
const ENDED = ['done', 'limit', 'refused', 'stopped'];
const find = selector => element.querySelector(selector);
const lanesBox = find('.lanes');
let columns = [], run = null, shown = null;  // shown: the view that is drawn

function svg(tag, attributes, parent) {
  const node = document.createElementNS(SVG, tag);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (parent) parent.append(node);
  return node;
}
function setText(node, text) {  // writes only when it changes: screen readers announce every write
  if (node.textContent !== text) node.textContent = text;
}
const percent = p => p >= 0.9995 ? '100 %' : p < 0.001 ? '< 0.1 %' : (100 * p).toFixed(p < 0.1 ? 1 : 0) + ' %';

function makeColumn(lane, index) {
  const card = html('article', 'lane ' + (lane.defended ? 'defended' : 'undefended'));
  const head = html('header', 'lane-head', card);
  const icon = svg('svg', {viewBox: '0 0 20 20', class: 'shield', 'aria-hidden': 'true'}, head);
  svg('path', {d: 'M10 1.8 17 4.2v5.2c0 4.2-2.8 7.2-7 8.8-4.2-1.6-7-4.6-7-8.8V4.2Z'}, icon);
  svg('path', {d: lane.defended ? 'M6.6 9.8 9.2 12.4 13.6 7.4' : 'M7 7l6 6M13 7l-6 6', class: 'shield-mark'}, icon);
  const title = html('h3', '', head, lane.name);
  title.id = 'lane-title-' + index;
  card.setAttribute('aria-labelledby', title.id);
  const state = html('span', 'state', head);
  const chips = html('div', 'chips', card);
  for (const chip of lane.chips) html('span', 'chip chip-' + chip.key, chips, chip.label);
  const badge = html('span', 'badge', chips);
  const text = html('div', 'text', card);
  text.tabIndex = 0;
  text.setAttribute('role', 'group');
  text.setAttribute('aria-label', `Answer: ${lane.name}. Arrow keys go from token to token.`);
  const cover = html('div', 'cover', text);
  cover.hidden = true;
  html('span', '', cover, 'The rest reached the alarm and is covered.');
  html('button', 'quiet', cover, 'Show it').type = 'button';
  const body = html('div', 'body', text);
  const placeholder = html('div', 'placeholder', text);
  const inspector = html('div', 'inspector', card);
  const plot = svg('svg', {class: 'trace', role: 'img', 'aria-label': 'Harm probability per token: ' + lane.name}, card);
  const foot = html('footer', 'lane-foot', card);
  const summary = html('p', 'summary', foot);
  const speed = html('p', 'speed', foot);
  const column = {card, state, badge, text, body, cover, placeholder, inspector, plot, summary, speed, spans: [],
                  shown: 0, width: 0, scale: '', lit: null, lane, covered: lane.covered};
  inspectable(column);
  return column;
}

function rebuild(view) {
  if (view.run !== run) {
    marks.clear();
    alarm = null;  // moved for the run before: this one was run with the calibrated line
    // On a phone the answers are below the form: bring a new run into view.
    if (view.run !== 'empty' && window.innerWidth <= 900) element.scrollIntoView({block: 'start', behavior: 'smooth'});
  }
  run = view.run;
  widths.disconnect();
  columns = view.lanes.map(makeColumn);
  lanesBox.replaceChildren(...columns.map(column => column.card));
  columns.forEach(column => widths.observe(column.plot));
  lanesBox.dataset.count = columns.length;
  lanesBox.dataset.run = run;
}

function placeholderText(lane) {
  if (lane.state === 'waiting' || lane.state === 'queued') return lane.wait;
  if (lane.state === 'empty') return lane.hint;
  if (lane.state === 'stopped') return 'Stopped before the first word.';
  return ['error', 'memory'].includes(lane.state) ? 'No answer: see the message beside the Run button.' : '';
}

function addTokens(column, lane) {
  if (column.shown === lane.tokens.length) return;
  const fresh = document.createDocumentFragment(), line = alarmOf(shown);
  for (; column.shown < lane.tokens.length; column.shown++) {
    const i = column.shown, harm = lane.harm[i];
    for (const mark of lane.marks) {
      if (mark.token === i && mark.type === 'injection') {
        const flag = html('span', 'flag', fresh);  // drawn by CSS, so that copied text stays the model's own
        flag.setAttribute('role', 'img');
        flag.title = `SAPT injected its reminder here: ${compared(mark.p, mark.t, true)}`;
        flag.setAttribute('aria-label', flag.title);
      }
    }
    const token = html('span', 'token', fresh, lane.tokens[i]);
    token.classList.toggle('over', line !== null && harm !== null && harm >= line);
    token.classList.toggle('covered', lane.covered !== null && i >= lane.covered);
    token.dataset.i = i;
    column.spans.push(token);
  }
  column.body.append(fresh);  // the box keeps to the end by itself (column-reverse): nothing is measured here
}

// A box that followed an answer to its end goes back to the first line, unless the reader has moved it, or what it says
// there (that the rest is covered) would be lost.
function toTheTop(column) {
  if (column.text.scrollTop === 0 && column.covered === null) column.text.scrollTop = -column.text.scrollHeight;
}

element.addEventListener('click', event => {
  if (event.target.closest('.cover button')) trigger('reveal', {run});
});
