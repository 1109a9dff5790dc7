// The trace: a frame that is drawn anew only when its scale changes, and a line that grows.
const PLOT = {height: 118, left: 30, right: 10, top: 10, bottom: 20};

function drawFrame(column, view, width, line) {
  const {height, left, right, top, bottom} = PLOT, {plot} = column;
  column.x = i => left + (i + 0.5) * (width - left - right) / view.axis;
  column.at = px => Math.round((px - left) * view.axis / (width - left - right) - 0.5);
  column.y = p => top + (1 - p) * (height - top - bottom);
  const {x, y} = column;
  plot.setAttribute('viewBox', `0 0 ${width} ${height}`);
  plot.replaceChildren();
  if (line !== null) svg('rect', {class: 'alarm', x: left, y: y(1), width: width - left - right, height: y(line) - y(1)}, plot);
  for (const p of [0, 0.5, 1]) {
    svg('line', {class: 'grid', x1: left, x2: width - right, y1: y(p), y2: y(p)}, plot);
    svg('text', {class: 'tick', x: left - 6, y: y(p) + 3.5, 'text-anchor': 'end'}, plot).textContent = p === 0.5 ? '.5' : p;
  }
  const step = Math.max(16, Math.ceil(view.axis / 5 / 16) * 16);
  for (let i = 0; i < view.axis && x(i) < width - right - 44; i += step) {
    svg('text', {class: 'tick', x: x(i), y: height - 5, 'text-anchor': 'middle'}, plot).textContent = i;
  }
  svg('text', {class: 'tick', x: width - right, y: height - 5, 'text-anchor': 'end'}, plot).textContent = 'token';
  column.area = svg('polygon', {class: 'area'}, plot);
  column.line = svg('polyline', {class: 'line'}, plot);
  if (line !== null) {
    svg('line', {class: 'threshold', x1: left, x2: width - right, y1: y(line), y2: y(line)}, plot);
    column.label = svg('text', {class: 'threshold-label', x: width - right - 2, 'text-anchor': 'end'}, plot);
    column.label.textContent = 'alarm ≥ ' + line.toFixed(2);
  }
  column.dots = svg('g', {}, plot);
  column.marks = svg('g', {}, plot);
  column.head = svg('circle', {class: 'head', r: 3.5}, plot);
  column.cursor = svg('line', {class: 'cursor', y1: top, y2: height - bottom, visibility: 'hidden'}, plot);
  column.spot = svg('circle', {class: 'spot', r: 4.5, visibility: 'hidden'}, plot);
  Object.assign(column, {points: [], traced: 0, marked: 0});
}

function drawTrace(column, lane, view) {
  const line = alarmOf(view), scale = [column.width, view.axis, line, marks.key()].join();
  if (scale !== column.scale) {
    column.scale = scale;
    drawFrame(column, view, column.width, line);
    light(column, column.lit);
  }
  const {x, y, points} = column, before = column.traced;
  for (; column.traced < lane.harm.length; column.traced++) {
    const p = lane.harm[column.traced], px = x(column.traced);
    if (p === null) continue;
    points.push(px.toFixed(1) + ',' + y(p).toFixed(1));
    if (line !== null && p >= line) svg('rect', {class: 'above', x: px - 2, y: y(p) - 2, width: 4, height: 4}, column.dots);
    column.head.setAttribute('cx', px);
    column.head.setAttribute('cy', y(p));
  }
  if (column.traced !== before && points.length) {
    const path = points.join(' '), end = ',' + y(0);
    column.line.setAttribute('points', path);
    column.area.setAttribute('points', points[0].split(',')[0] + end + ' ' + path + ' ' + points[points.length - 1].split(',')[0] + end);
  }
  if (line !== null) placeLabel(column, line);
  column.head.style.display = lane.state === 'streaming' && points.length ? '' : 'none';
  for (; column.marked < lane.marks.length; column.marked++) drawMark(column, lane, lane.marks[column.marked]);
}

// Under the alarm line, or above it where the trace runs just below and not just above.
function placeLabel(column, line) {
  const from = column.width - PLOT.right - 78, at = column.y(line);
  const meets = (high, low) => column.points.some(point => {
    const [px, py] = point.split(',').map(Number);
    return px >= from && py >= high && py <= low;
  });
  const above = line <= 0.2 || (meets(at, at + 16) && !meets(at - 16, at));
  column.label.setAttribute('y', Math.max(9, at + (above ? -5 : 12)));  // below the drawing's edge
}

function drawMark(column, lane, mark) {
  const {x, y} = column, px = x(mark.token), injection = mark.type === 'injection';
  const moved = marks.of(lane.name, 'sapt'), fired = reached(mark, moved);
  if (injection) svg('line', {class: 'inject-line', x1: px, x2: px, y1: y(mark.p) + 4, y2: y(0)}, column.marks);
  const node = injection ? svg('path', {class: 'inject', d: `M${px - 6} ${y(0) + 1} h12 l-6 -11 Z`}, column.marks)
    : svg('circle', {class: 'check' + (fired ? ' fired' : ''), cx: px, cy: y(mark.p), r: 4}, column.marks);
  svg('title', {}, node).textContent = markText(mark, moved);
}

function markText(mark, moved) {
  const verb = mark.type === 'injection' ? 'injected its reminder' : 'checked';
  return `SAPT ${verb}: ${compared(mark.p, moved ?? mark.t, reached(mark, moved))}`;
}

const widths = new ResizeObserver(entries => {
  for (const entry of entries) {
    const column = columns.find(column => column.plot === entry.target);
    if (column) column.width = Math.max(160, Math.round(entry.contentRect.width));
  }
  schedule();
});
