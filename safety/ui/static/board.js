// One column per lane: streamed tokens above a live harm trace. Runs inside gr.HTML (js_on_load): `element`, `props`
// and `watch` come from Gradio. Model text only ever goes through textContent, so markup in it stays text.
const SVG = 'http://www.w3.org/2000/svg';
const PLOT = {height: 132, left: 30, right: 10, top: 10, bottom: 20};
const STATES = {empty: 'Ready', waiting: 'Waiting', streaming: 'Writing', done: 'Done', limit: 'Length limit', refused: 'Refused',
                stopped: 'Stopped', error: 'Failed'};
const lanesBox = element.querySelector('.lanes');
let columns = [], run = null;

function html(tag, className, parent, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}
function svg(tag, attributes, parent) {
  const node = document.createElementNS(SVG, tag);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (parent) parent.append(node);
  return node;
}
function setText(node, text) {  // writes only when it changes: screen readers announce every write
  if (node.textContent !== text) node.textContent = text;
}

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
  text.setAttribute('role', 'region');
  text.setAttribute('aria-label', 'Answer: ' + lane.name);
  const body = html('div', 'body', text);
  html('div', 'placeholder', text);
  const plot = svg('svg', {class: 'trace', role: 'img', 'aria-label': 'Harm probability per token: ' + lane.name}, card);
  const foot = html('footer', 'lane-foot', card);
  const summary = html('p', 'summary', foot);
  summary.setAttribute('role', 'status');
  summary.setAttribute('aria-live', 'polite');
  const speed = html('p', 'speed', foot);
  return {card, state, badge, text, body, placeholder: text.lastChild, plot, summary, speed, shown: 0, width: 0, scale: ''};
}

function rebuild(view) {
  run = view.run;
  widths.disconnect();
  columns = view.lanes.map(makeColumn);
  lanesBox.replaceChildren(...columns.map(column => column.card));
  columns.forEach(column => widths.observe(column.plot));
  lanesBox.dataset.count = columns.length;
  lanesBox.dataset.run = run;
  // On a phone the answers are below the form: bring a new run into view.
  if (run !== 'empty' && window.innerWidth <= 900) element.scrollIntoView({block: 'start', behavior: 'smooth'});
}

function placeholderText(lane) {
  if (lane.state === 'waiting') return lane.wait;
  if (lane.state === 'empty') return lane.hint;
  if (lane.state === 'stopped') return 'Stopped before the first word.';
  return lane.state === 'error' ? 'No answer: see the message beside the Run button.' : '';
}

function addTokens(column, lane, threshold) {
  if (column.shown === lane.tokens.length) return;
  const fresh = document.createDocumentFragment();
  for (; column.shown < lane.tokens.length; column.shown++) {
    const i = column.shown, harm = lane.harm[i];
    for (const mark of lane.marks) {
      if (mark.token === i && mark.type === 'injection') {
        const flag = html('span', 'flag', fresh);  // drawn by CSS, so that copied text stays the model's own
        flag.setAttribute('role', 'img');
        flag.title = `SAPT injected its reminder here: ${mark.p.toFixed(2)} ≥ ${mark.t.toFixed(2)}`;
        flag.setAttribute('aria-label', flag.title);
      }
    }
    const over = threshold !== null && harm !== null && harm >= threshold;
    const token = html('span', over ? 'token over' : 'token', fresh, lane.tokens[i]);
    if (harm !== null) token.title = `token ${i} · harm ${harm.toFixed(2)}` + (over ? ` ≥ ${threshold.toFixed(2)}` : '');
  }
  column.body.append(fresh);  // the box keeps to the end by itself (column-reverse): nothing is measured here
}

// The trace: a frame that is drawn anew only when its scale changes, and a line that grows.
function drawFrame(column, view, width) {
  const {height, left, right, top, bottom} = PLOT, {plot} = column, threshold = view.threshold;
  column.x = i => left + (i + 0.5) * (width - left - right) / view.axis;
  column.y = p => top + (1 - p) * (height - top - bottom);
  const {x, y} = column;
  plot.setAttribute('viewBox', `0 0 ${width} ${height}`);
  plot.replaceChildren();
  if (threshold !== null) svg('rect', {class: 'alarm', x: left, y: y(1), width: width - left - right, height: y(threshold) - y(1)}, plot);
  for (const p of [0, 0.5, 1]) {
    svg('line', {class: 'grid', x1: left, x2: width - right, y1: y(p), y2: y(p)}, plot);
    svg('text', {class: 'tick', x: left - 6, y: y(p) + 3.5, 'text-anchor': 'end'}, plot).textContent = p === 0.5 ? '.5' : p;
  }
  const step = Math.max(16, Math.ceil(view.axis / 5 / 16) * 16);
  for (let i = 0; i < view.axis && x(i) < width - right - 44; i += step) {
    svg('text', {class: 'tick', x: x(i), y: height - 5, 'text-anchor': 'middle'}, plot).textContent = i;
  }
  svg('text', {class: 'tick', x: width - right, y: height - 5, 'text-anchor': 'end'}, plot).textContent = 'token';
  if (threshold !== null) {
    svg('line', {class: 'threshold', x1: left, x2: width - right, y1: y(threshold), y2: y(threshold)}, plot);
    const label = svg('text', {class: 'threshold-label', x: width - right - 2, y: y(threshold) + 12, 'text-anchor': 'end'}, plot);
    label.textContent = 'alarm ≥ ' + threshold.toFixed(2);
  }
  column.area = svg('polygon', {class: 'area'}, plot);
  column.line = svg('polyline', {class: 'line'}, plot);
  column.dots = svg('g', {}, plot);
  column.marks = svg('g', {}, plot);
  column.head = svg('circle', {class: 'head', r: 3.5}, plot);
  Object.assign(column, {points: [], traced: 0, marked: 0});
}

function drawTrace(column, lane, view) {
  const scale = [column.width, view.axis, view.threshold].join();
  if (scale !== column.scale) {
    column.scale = scale;
    drawFrame(column, view, column.width);
  }
  const {x, y, points} = column, threshold = view.threshold, before = column.traced;
  for (; column.traced < lane.harm.length; column.traced++) {
    const p = lane.harm[column.traced], px = x(column.traced);
    if (p === null) continue;
    points.push(px.toFixed(1) + ',' + y(p).toFixed(1));
    if (threshold !== null && p >= threshold) svg('rect', {class: 'above', x: px - 2, y: y(p) - 2, width: 4, height: 4}, column.dots);
    column.head.setAttribute('cx', px);
    column.head.setAttribute('cy', y(p));
  }
  if (column.traced !== before && points.length) {
    const line = points.join(' '), end = ',' + y(0);
    column.line.setAttribute('points', line);
    column.area.setAttribute('points', points[0].split(',')[0] + end + ' ' + line + ' ' + points[points.length - 1].split(',')[0] + end);
  }
  column.head.style.display = lane.state === 'streaming' && points.length ? '' : 'none';
  for (; column.marked < lane.marks.length; column.marked++) drawMark(column, lane.marks[column.marked]);
}

function drawMark(column, mark) {
  const {x, y, marks} = column, px = x(mark.token), injection = mark.type === 'injection';
  if (injection) svg('line', {class: 'inject-line', x1: px, x2: px, y1: y(mark.p) + 4, y2: y(0)}, marks);
  const node = injection ? svg('path', {class: 'inject', d: `M${px - 6} ${y(0) + 1} h12 l-6 -11 Z`}, marks)
    : svg('circle', {class: 'check' + (mark.fired ? ' fired' : ''), cx: px, cy: y(mark.p), r: 4}, marks);
  svg('title', {}, node).textContent = `SAPT ${injection ? 'injected' : 'checked'} at token ${mark.token}: ${mark.p.toFixed(2)}`;
}

function drawBadge(badge, lane) {
  const gate = lane.badge;
  badge.hidden = !gate;
  if (!gate) return;
  const waiting = gate.p === null;
  badge.className = 'badge ' + (waiting ? 'pending' : gate.fired ? 'fired' : 'passed');
  setText(badge, waiting ? 'SASA judges the prompt …'
    : `SASA ${gate.p.toFixed(2)} ${gate.fired ? '≥' : '<'} ${gate.t.toFixed(2)} → ${gate.fired ? 'refused' : 'passed'}`);
}

function draw() {
  const view = props.value;
  if (!view || !view.lanes) return;
  const shrunk = columns.some((column, i) => view.lanes[i] && view.lanes[i].tokens.length < column.shown);
  if (view.run !== run || view.lanes.length !== columns.length || shrunk) rebuild(view);
  view.lanes.forEach((lane, i) => {
    const column = columns[i];
    if (column.card.dataset.state !== lane.state) column.card.dataset.state = lane.state;
    setText(column.state, STATES[lane.state]);
    setText(column.placeholder, lane.tokens.length ? '' : placeholderText(lane));
    drawBadge(column.badge, lane);
    addTokens(column, lane, view.threshold);
    if (column.width) drawTrace(column, lane, view);
    setText(column.summary, lane.summary);
    setText(column.speed, lane.speed);
  });
}

// At most one drawing per frame, however many updates arrived: a slow browser skips frames instead of falling behind.
let waiting = false;
function schedule() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; draw(); });
}
const widths = new ResizeObserver(entries => {
  for (const entry of entries) {
    const column = columns.find(column => column.plot === entry.target);
    if (column) column.width = Math.max(160, Math.round(entry.contentRect.width));
  }
  schedule();
});
watch('value', schedule);
draw();
