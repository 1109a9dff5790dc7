// The columns and their knobs. `props.spec` (knobs.py) says what can be turned; `props.value` is the form that a run
// gets. The form lives here; lane 0, the undefended one, is always there and has no card.
const list = element.querySelector('.lane-list'), samplingBox = element.querySelector('.sampling .knobs'), sweepBox = element.querySelector('.sweep');
let form = null, open = new Set();  // open: the disclosures that the visitor opened

const copy = value => JSON.parse(JSON.stringify(value));
const defenseOf = key => props.spec.defenses.find(defense => defense.key === key);
const defensesOn = lane => props.spec.defenses.filter(defense => lane[defense.key]?.on);

// What gives a column's probabilities, as in _judges (board.py): another probe is another number.
const judges = lane => ({
  sasa: lane.sasa?.on ? [wayOf(lane.sasa), lane.sasa.mode === 'gate' ? lane.sasa.strength : null] : undefined,
  sapt: lane.sapt?.on ? [lane.sapt.detector, lane.sapt.interval, lane.sapt.end_check] : undefined,
});

// Each column's thresholds under the name that a run gives it: as in lanes_of (knobs.py), idle columns are left out, blank
// names numbered and repeated ones marked.
function thresholds() {
  const told = {};
  form.lanes.forEach((lane, i) => {
    if (!defensesOn(lane).length) return;
    let name = [...lane.name.trim()].slice(0, 40).join('') || `Column ${i + 1}`;
    while (name === props.spec.undefended || Object.hasOwn(told, name)) name += ' ′';
    told[name] = {sasa: lane.sasa?.threshold, sapt: lane.sapt?.threshold, judges: judges(lane)};
  });
  return told;
}

function publish() {  // hand the form to Gradio, and the thresholds to the board, which re-marks the last run
  props.value = copy(form);
  window.dispatchEvent(new CustomEvent('safety:thresholds', {detail: thresholds()}));
  markLayout();
}

let made = 0;
function knob(control, values, parent, changed) {
  const row = html('div', 'knob knob-' + control.type, parent), id = 'knob-' + ++made;
  const label = html('label', '', row, control.label);
  label.htmlFor = id;
  let input;
  const set = value => { values[control.key] = value; changed(); };
  if (control.type === 'choice') {
    input = html('select', '', row);
    control.options.forEach(([text, value], i) => {
      const option = html('option', '', input, text);
      option.value = i;
      option.selected = value === values[control.key];
    });
    input.addEventListener('change', () => set(control.options[input.value][1]));
  } else if (control.type === 'check') {
    input = html('input', '', row);
    input.type = 'checkbox';
    input.checked = values[control.key];
    input.addEventListener('change', () => set(input.checked));
  } else {
    const number = html('input', 'number', row);
    number.type = 'number';
    Object.assign(number, {min: control.min, max: control.max, step: control.step, value: values[control.key]});
    number.id = id;
    const take = value => {
      const kept = Math.min(control.max, Math.max(control.min, Number(value)));
      return Number.isFinite(kept) && value !== '' ? (control.step >= 1 ? Math.round(kept) : kept) : values[control.key];
    };
    number.addEventListener('input', () => { if (input) input.value = number.value; set(take(number.value)); });
    number.addEventListener('change', () => { number.value = values[control.key]; });
    if (control.type === 'range') {
      input = html('input', 'range', row);
      input.type = 'range';
      Object.assign(input, {min: control.min, max: control.max, step: control.step, value: values[control.key]});
      input.setAttribute('aria-label', control.label);
      input.addEventListener('input', () => { number.value = input.value; set(take(input.value)); });
    }
  }
  if (input && control.type !== 'range') input.id = id;
  if (control.info) {
    const info = html('small', '', row, control.info);
    info.id = id + '-info';
    row.querySelector('#' + id).setAttribute('aria-describedby', info.id);
  }
}

// SASA's probes have a calibrated threshold each: one that the visitor has not moved goes with the probe.
const wayOf = values => ({probe: 'clean', reading: 'reading'})[values.mode]
  ?? (values.choice === 'per-input' ? 'per-input' : values.pair);
function thresholdFollows(defense, values, panel) {
  let way = wayOf(values);
  return () => {
    const {thresholds, calibrated} = defense, before = thresholds[way] ?? calibrated.threshold;
    way = wayOf(values);
    const papers = values.mode === 'reading' && values.threshold === defense.paper.threshold;  // no value of the mode's own
    if (thresholds[way] !== undefined && (values.threshold === before || papers)) {
      values.threshold = thresholds[way];
      const row = panel.children[defense.controls.findIndex(control => control.key === 'threshold')];
      for (const input of row.querySelectorAll('input')) input.value = values.threshold;
    }
    publish();
  };
}

// What keeps a control from doing anything: [setting, the values with which it would act].
const unmet = (control, values) => Object.entries(control.when ?? {}).filter(([key, allowed]) => !allowed.includes(values[key]));
function showWhatActs(defense, values, panel) {
  defense.controls.forEach((control, i) => { panel.children[i].hidden = unmet(control, values).length > 0; });
}

function defenseRow(lane, index, defense, parent) {
  const box = html('div', `defense defense-${defense.key}`, parent), id = `lane-${index}-${defense.key}`;
  const head = html('div', 'defense-head', box), label = html('label', 'switch', head), input = html('input', '', label);
  input.type = 'checkbox';
  input.setAttribute('role', 'switch');
  input.checked = Boolean(lane[defense.key]?.on);
  input.disabled = !defense.available;
  const words = html('span', '', label);
  html('b', '', words, defense.name);
  html('small', '', words, defense.hint);
  const panel = html('div', 'knobs', box), toggle = html('button', 'quiet settings', head, 'Settings');
  toggle.type = 'button';
  panel.id = id;
  toggle.setAttribute('aria-controls', id);
  const draw = () => {
    const on = Boolean(lane[defense.key]?.on);
    toggle.hidden = !on;
    panel.hidden = !on || !open.has(id);
    toggle.setAttribute('aria-expanded', String(!panel.hidden));
    if (!panel.hidden && !panel.children.length) {
      const values = lane[defense.key], follow = thresholdFollows(defense, values, panel);
      const changed = () => { follow(); showWhatActs(defense, values, panel); };
      for (const control of defense.controls) knob(control, values, panel, changed);
      showWhatActs(defense, values, panel);
    }
  };
  input.addEventListener('change', () => {
    lane[defense.key] = {...copy(defense.calibrated), ...lane[defense.key], on: input.checked};
    panel.replaceChildren();
    draw();
    publish();
  });
  toggle.addEventListener('click', () => { open.has(id) ? open.delete(id) : open.add(id); draw(); });
  draw();
}

function laneCard(lane, index) {
  const single = form.lanes.length === 1, card = html(single ? 'div' : 'details', 'lane-card', list);
  const head = html(single ? 'div' : 'summary', 'lane-card-head', card);
  if (single) { card.setAttribute('role', 'group'); card.setAttribute('aria-label', lane.name); head.hidden = true; }
  const told = html('span', 'told', head);
  const tell = () => {
    told.replaceChildren();
    html('b', '', told, lane.name);
    const on = defensesOn(lane), named = on.length === 1 && on[0].short === lane.name;
    html('small', '', told, named ? on[0].hint : on.map(d => d.short).join(' · ') || 'nothing intervenes');
    card.querySelector('.remove')?.setAttribute('aria-label', `Remove the column ${lane.name}`);
    card.querySelectorAll('.settings').forEach((toggle, i) => toggle.setAttribute('aria-label', `Settings of ${props.spec.defenses[i].name} in ${lane.name}`));
  };
  if (!single) {
    card.open = open.has('lane-' + index);
    card.addEventListener('toggle', () => card.open ? open.add('lane-' + index) : open.delete('lane-' + index));
    const row = html('div', 'lane-name', card), label = html('label', '', row, 'Name');
    const name = html('input', '', row);
    name.id = label.htmlFor = 'lane-name-' + index;
    Object.assign(name, {type: 'text', maxLength: 40, value: lane.name});
    name.addEventListener('input', () => { lane.name = name.value; tell(); publish(); });
    const remove = html('button', 'quiet remove', row, 'Remove');
    remove.type = 'button';
    remove.addEventListener('click', () => { form.lanes.splice(index, 1); open.clear(); build(); publish(); element.querySelector('.add').focus(); });
  }
  for (const defense of props.spec.defenses) defenseRow(lane, index, defense, card);
  tell();
  card.addEventListener('change', tell);
}

function build() {
  list.replaceChildren();
  form.lanes.forEach(laneCard);
  if (!form.lanes.length) html('p', 'no-lanes', list, props.spec.layouts.together.length ? 'Only the undefended answer will run.'
    : props.spec.version ? 'No defense is available: see the model above.' : 'The defenses appear here once a model is loaded.');
  listBases();
  element.querySelector('.add').disabled = form.lanes.length >= props.spec.max_lanes || !props.spec.defenses.some(defense => defense.available);
  samplingBox.replaceChildren();
  for (const control of props.spec.sampling) knob(control, form, samplingBox, publish);
}

function markLayout() {
  const same = name => JSON.stringify(form.lanes.map(bare)) === JSON.stringify(props.spec.layouts[name].map(bare));
  const now = form.lanes.length ? ['together', 'each'].find(same) : undefined;  // with one defense they are the same
  for (const button of element.querySelectorAll('[data-layout]')) {
    if (button.dataset.layout !== 'sweep') button.setAttribute('aria-pressed', String(button.dataset.layout === now));
  }
}
const bare = lane => [lane.name, ...props.spec.defenses.map(d => Boolean(lane[d.key]?.on))];
