// Ready-made sets of columns, sweeps, links: everything that replaces the form as a whole.
function adopt(next, focus) {
  form = copy(next);
  open.clear();
  build();
  publish();
  if (focus) focus.focus();
}

element.addEventListener('click', event => {
  const button = event.target.closest('button');
  if (!button || !form) return;
  const {layout, values} = button.dataset;
  if (layout === 'sweep') {
    sweepBox.hidden = !sweepBox.hidden;
    listBases();
    button.setAttribute('aria-expanded', String(!sweepBox.hidden));
  } else if (layout) {
    adopt({...form, lanes: props.spec.layouts[layout]}, button);
  } else if (values) {
    for (const lane of form.lanes) for (const {key, [values]: set} of props.spec.defenses) if (set && lane[key]) lane[key] = {...copy(set), on: lane[key].on};
    const kept = [...open];
    build();
    open = new Set(kept);
    build();
    publish();
  } else if (button.classList.contains('add')) {
    const model = copy(form.lanes[form.lanes.length - 1] ?? props.spec.layouts.together[0]), names = form.lanes.map(lane => lane.name);
    let number = form.lanes.length + 1;
    while (names.includes(`Column ${number}`)) number++;
    open.add('lane-' + form.lanes.length);
    form.lanes.push({...model, name: `Column ${number}`});
    build();
    publish();
    list.lastChild.querySelector('input').focus();
  } else if (button.classList.contains('reset')) {
    adopt(props.spec.start, button);
  }
});

// A sweep: one setting's values as columns, all else as in a column that is there.
let baseBox = null;
function listBases() {
  if (!baseBox) return;
  const chosen = [...form.lanes.keys()].find(i => open.has('lane-' + i)) ?? 0;
  baseBox.replaceChildren();
  form.lanes.forEach((lane, i) => { Object.assign(html('option', '', baseBox, lane.name), {value: i, selected: i === chosen}); });
  html('option', '', baseBox, 'no other defense').value = -1;
}
function buildSweep() {
  sweepBox.replaceChildren();
  baseBox = null;
  const knobs = props.spec.defenses.flatMap(defense => defense.controls.filter(control => control.type === 'range').map(control => ({defense, control})));
  if (!knobs.length) return html('p', 'no-lanes', sweepBox, 'There is nothing to sweep: no defense is available.');
  const field = (text, node) => {
    const label = html('label', '', sweepBox, text);
    label.append(node);
    return node;
  };
  const which = field('Setting', html('select', ''));
  knobs.forEach(({defense, control}, i) => { html('option', '', which, `${defense.short}: ${control.label}`).value = i; });
  baseBox = field('All else as in', html('select', ''));
  const number = (text, values) => Object.assign(field(text, html('input', '')), {type: 'number', ...values});
  const low = number('From', {}), high = number('To', {}), count = number('Columns', {min: 2, max: props.spec.max_lanes, step: 1, value: Math.min(4, props.spec.max_lanes)});
  const bounds = () => {
    const {control} = knobs[which.value];
    for (const input of [low, high]) Object.assign(input, {min: control.min, max: control.max, step: 'any'});
    low.value = control.min;
    high.value = control.max;
  };
  which.addEventListener('change', bounds);
  bounds();
  html('button', 'quiet', sweepBox, 'Make the columns').type = 'submit';
  sweepBox.onsubmit = event => {
    event.preventDefault();
    const {defense, control} = knobs[which.value], n = Math.round(Math.min(props.spec.max_lanes, Math.max(2, Number(count.value))));
    const base = form.lanes[baseBox.value] ?? {}, own = {...copy(defense.calibrated), ...base[defense.key], on: true};
    for (const [key, allowed] of unmet(control, own)) {
      own[key] = allowed[0];  // the setting does nothing in the column's mode: swept in one in which it acts
      if (defense.key === 'sasa') own.threshold = defense.thresholds[wayOf(own)] ?? own.threshold;
    }
    const clamp = value => Math.min(control.max, Math.max(control.min, value)), seen = new Set(), lanes = [];
    for (let i = 0; i < n; i++) {
      const raw = clamp(Number(low.value) + (Number(high.value) - Number(low.value)) * i / (n - 1));
      const value = control.step >= 1 ? Math.round(raw) : Math.round(raw * 1000) / 1000;
      if (seen.has(value)) continue;
      seen.add(value);
      lanes.push({...copy(base), name: `${defense.short}, ${control.sign} ${value}`, [defense.key]: {...own, [control.key]: value}});
    }
    const toggle = element.querySelector('[data-layout=sweep]');
    sweepBox.hidden = true;  // the columns are what is wanted now
    toggle.setAttribute('aria-expanded', 'false');
    adopt({...form, lanes}, toggle);
  };
}

// Links: the settings and the prompt behind the #, which browsers do not send to servers. A picture is not in it,
// unless it is an example's.
const pack = value => btoa(String.fromCharCode(...new TextEncoder().encode(JSON.stringify(value)))).replace(/\+/g, '-').replace(/\//g, '_').replace(/=+$/, '');
const unpack = text => JSON.parse(new TextDecoder().decode(Uint8Array.from(atob(text.replace(/-/g, '+').replace(/_/g, '/')), sign => sign.charCodeAt(0))));

window.addEventListener('safety:link', event => {
  const prompt = document.querySelector('#prompt textarea').value, preset = document.querySelector('#examples .card-fill[data-pictured="true"]')?.dataset.key ?? null;
  const own = !preset && document.querySelector('#image img');  // an example's picture comes with the link
  event.detail.told = own ? 'Link copied. Your picture is not in it: whoever opens it has to add the picture.' : 'Link copied.';
  event.detail.link = `${location.origin}${location.pathname}#s=${pack({form, prompt, preset})}`;
});

// Keep of a linked form only what this model's knobs can be turned to; `dropped` takes the names of the rest.
function fitting(linked, dropped) {
  const start = copy(props.spec.start), fits = (control, value) => control.type === 'choice' ? control.options.some(option => option[1] === value)
    : control.type === 'check' ? typeof value === 'boolean' : typeof value === 'number' && value >= control.min && value <= control.max;
  const take = (controls, from, to, whose) => {
    for (const control of controls) {
      if (fits(control, from[control.key])) to[control.key] = from[control.key];
      else if (from[control.key] !== undefined) dropped.add(whose + control.label);
    }
  };
  take(props.spec.sampling, linked, start, '');
  if (linked.lanes?.length > props.spec.max_lanes) dropped.add('columns');
  start.lanes = (Array.isArray(linked.lanes) ? linked.lanes : []).slice(0, props.spec.max_lanes).map((lane, i) => {
    const kept = {name: String(lane.name ?? `Column ${i + 1}`).slice(0, 40)};
    for (const defense of props.spec.defenses) {
      if (!lane[defense.key]) continue;
      if (!defense.available) {
        if (lane[defense.key].on) dropped.add(defense.name);
        continue;
      }
      kept[defense.key] = {...copy(defense.calibrated), on: lane[defense.key].on === true};
      take(defense.controls, lane[defense.key], kept[defense.key], defense.short + ': ');
    }
    return kept;
  });
  return start;
}

let linked = location.hash.startsWith('#s=');
function follow() {
  linked = false;
  try {
    const {form: wanted, prompt, preset} = unpack(location.hash.slice(3));
    const dropped = new Set();
    adopt(fitting(wanted, dropped));
    trigger('restore', {prompt: String(prompt ?? ''), preset: typeof preset === 'string' ? preset : null, dropped: [...dropped]});
  } catch (error) {
    trigger('restore', {broken: true});
  }
}

let version = null;
function refresh() {  // another model: start from what it can do
  if (!props.spec) return;
  if (props.spec.version === version) {  // an update of something else brings back the value that the server knows
    if (JSON.stringify(props.value) !== JSON.stringify(form)) props.value = copy(form);
    return;
  }
  version = props.spec.version;
  buildSweep();
  adopt(props.spec.start);
  if (linked && props.spec.version) follow();
}
watch(['spec', 'value'], refresh);
refresh();
