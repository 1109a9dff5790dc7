// Moving a threshold after a run marks the same run anew, here in the browser; the model is not asked again.
const knob = find('.alarm-knob'), knobInput = knob.querySelector('input'), knobButton = knob.querySelector('button');
let alarm = null;  // the visitor's alarm line, null for the calibrated one

const marks = {
  moved: {},  // {lane name: {sasa, sapt}}: thresholds that differ from what the run used
  of(name, defense) { return this.moved[name]?.[defense]; },
  key() { return JSON.stringify(this.moved); },
  clear() { this.moved = {}; },
};
const alarmOf = view => view.threshold === null ? null : alarm ?? view.threshold;

function remark() {
  const line = alarmOf(shown);
  for (const column of columns) {
    column.spans.forEach((token, i) => {
      const harm = column.lane.harm[i];
      token.classList.toggle('over', line !== null && harm !== null && harm >= line);
    });
  }
  schedule();
}

function drawKnob(view) {
  knob.hidden = view.threshold === null;
  if (knob.hidden) return;
  const line = alarmOf(view);
  if (document.activeElement !== knobInput) knobInput.value = line;
  knobInput.setAttribute('aria-valuetext', line.toFixed(2));
  setText(knob.querySelector('output'), line.toFixed(2));
  knobButton.hidden = line === view.threshold;
}
knobInput.addEventListener('input', () => {
  alarm = Number(knobInput.value);
  remark();
});
knobButton.addEventListener('click', () => {
  alarm = null;
  knobInput.focus();
  knobInput.value = shown.threshold;
  remark();
});

// "0.95 ≥ 0.90", with as many digits as it takes to tell the two apart. What the run did counts; p is compared anew
// only with a threshold that was moved since.
const reached = (mark, moved) => moved === undefined ? mark.fired : mark.p >= moved;
function compared(p, t, over) {
  let digits = 2;
  while (digits < 5 && p !== t && p.toFixed(digits) === t.toFixed(digits)) digits++;
  return `${p.toFixed(digits)} ${over ? '≥' : '<'} ${t.toFixed(digits)}`;
}

function badgeText(lane, moved) {
  const gate = lane.badge, fired = reached(gate, moved);
  const told = moved === undefined ? (fired ? 'refused' : 'passed') : fired ? 'would refuse' : 'would pass';
  return `SASA ${compared(gate.p, moved ?? gate.t, fired)} → ${told}`;
}

function drawBadge(badge, lane) {
  const gate = lane.badge;
  badge.hidden = !gate;
  if (!gate) return;
  const waiting = gate.p === null;
  badge.className = 'badge ' + (waiting ? 'pending' : reached(gate, marks.of(lane.name, 'sasa')) ? 'fired' : 'passed');
  setText(badge, waiting ? 'SASA judges the prompt …' : badgeText(lane, marks.of(lane.name, 'sasa')));
}

function summaryText(lane, view) {
  if (!lane.summary) return '';
  const line = alarmOf(view), moved = marks.moved[lane.name], parts = [];
  if (line !== view.threshold) {
    const over = lane.harm.filter(p => p !== null && p >= line).length, first = lane.harm.findIndex(p => p !== null && p >= line);
    parts.push(over ? `at ${line.toFixed(2)} the alarm starts at token ${first}; ${over} token${over > 1 ? 's' : ''} above it`
      : `at ${line.toFixed(2)} no token is above the alarm`);
  }
  if (moved?.sapt !== undefined) {
    const check = lane.marks.find(mark => mark.type === 'check' && mark.p >= moved.sapt);
    parts.push(check ? `SAPT would step in at token ${check.token}` : 'SAPT would never step in');
  }
  if (moved?.sasa !== undefined && lane.badge && lane.badge.p !== null) {
    parts.push(lane.badge.p >= moved.sasa ? 'SASA would refuse' : 'SASA would let it pass');
  }
  return parts.length ? `Re-marked, not re-run: ${parts.join('; ')}.` : lane.summary;
}

// The editor tells which thresholds its lanes have now, and what judges in them. A threshold re-marks what the same judge said.
window.addEventListener('safety:thresholds', event => {
  if (!shown || !shown.lanes.every(lane => ENDED.includes(lane.state))) return;
  marks.clear();
  for (const lane of shown.lanes) {
    const now = event.detail[lane.name], check = lane.marks.find(mark => mark.type === 'check');
    if (!now) continue;
    const moved = {}, same = key => now.judges[key] && JSON.stringify(now.judges[key]) === JSON.stringify(lane.judges[key]);
    if (lane.badge && same('sasa') && now.sasa !== lane.badge.t) moved.sasa = now.sasa;
    if (check && same('sapt') && now.sapt !== check.t) moved.sapt = now.sapt;
    if (Object.keys(moved).length) marks.moved[lane.name] = moved;
  }
  schedule();
});
