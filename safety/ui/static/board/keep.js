// Keeping a run: as JSON, or as one page that needs nothing else. Both are made here, in the visitor's browser.
const keepBox = find('.keep'), kept = keepBox.querySelector('.kept');

function drawKeep(view) {
  const ended = view.lanes.every(lane => ENDED.includes(lane.state));
  for (const name of ['json', 'html']) keepBox.querySelector('.save-' + name).disabled = !ended;
}

function offer(name, type, content) {
  const link = html('a', '', null);
  link.href = URL.createObjectURL(new Blob([content], {type}));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  setText(kept, `Saved ${name}` + (shown.about.picture ? ', with a small copy of the picture' : ''));
}

// Was a threshold moved since the run? What it would do is no part of what the run gave.
const moved = view => alarmOf(view) !== view.threshold || Object.keys(marks.moved).length > 0;
const stamp = view => (view.about.date || '').slice(0, 19).replace(/[:T]/g, '-') || 'run';

const PAGE_STYLE = `body{font:16px/1.6 system-ui,sans-serif;color:#17212b;background:#fff;max-width:1200px;margin:32px auto;padding:0 20px}
.lanes{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,360px),1fr));gap:16px}
article{border:1px solid #dfe3e8;border-radius:10px;padding:14px}h2{font-size:1.1rem;margin:0 0 6px}
.answer{white-space:pre-wrap;overflow-wrap:anywhere}.over{text-decoration:underline solid #b34700 2px;background:#b3470014}
.flag{color:#aa4488;font:600 12px monospace;border:1px solid #aa4488;border-radius:4px;padding:0 4px;margin-right:4px}
.muted{color:#55616d;font-size:.88rem}svg{width:100%;height:auto}svg text{font:10px monospace;fill:#55616d}
.grid{stroke:#dfe3e8}.alarm{fill:#b3470014}.threshold{stroke:#b34700;stroke-dasharray:5 4}.area{fill:#0072b2;opacity:.1}
.line{fill:none;stroke:#0072b2;stroke-width:2}.above{fill:#b34700}.check{fill:#fff;stroke:#aa4488;stroke-width:2}
.check.fired,.inject{fill:#aa4488}.inject-line{stroke:#aa4488;stroke-dasharray:2 3}.head,.cursor,.spot{display:none}.banner{border-left:4px solid #b34700;background:#b3470014;padding:8px 12px}figure{margin:0 0 16px}figure img{max-width:320px;border:1px solid #dfe3e8}dt{font-weight:600}dd{margin:0 0 6px}`;

// Built node by node with textContent and then written out, so whatever a model or a visitor wrote is escaped.
function pageOf(view) {
  const page = document.implementation.createHTMLDocument('Safety, side by side: a saved run');
  const make = (tag, className, parent, text) => {
    const node = page.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  };
  const rules = make('meta', '', page.head);
  rules.httpEquiv = 'Content-Security-Policy';
  rules.content = "default-src 'none'; style-src 'unsafe-inline'; img-src data:";
  make('meta', '', page.head).setAttribute('charset', 'utf-8');
  make('style', '', page.head, PAGE_STYLE);
  make('h1', '', page.body, 'Safety, side by side: a saved run');
  make('p', '', page.body, view.verdict);
  const line = alarmOf(view);
  if (moved(view)) {
    make('p', 'banner', page.body, 'Re-marked: a threshold was moved after this run, and the model was not asked again. '
      + 'The answers and each column\'s status are what the run gave; what the moved thresholds would do is said beside it.'
      + (line === view.threshold ? '' : ` Words and traces are marked at the alarm line ${line.toFixed(2)}; the run had ${view.threshold.toFixed(2)}.`));
  }
  if (view.about.picture) {
    const figure = make('figure', '', page.body), picture = make('img', '', figure);
    picture.src = view.about.picture;
    picture.alt = 'The picture that the model was given';
    make('figcaption', 'muted', figure, 'The picture that the model was given, made smaller.');
  }
  const facts = make('dl', '', page.body);
  const told = {Model: view.about.model, Prompt: view.about.prompt, Image: view.about.image || 'none', Date: view.about.date,
                'Longest answer': view.about.max_new_tokens, Sampling: JSON.stringify(view.about.sampling)};
  if (view.recording) told.Recording = `played from a recording of ${view.recording.date}, commit ${view.recording.commit}`;
  for (const [name, value] of Object.entries(told)) {
    make('dt', '', facts, name);
    make('dd', '', facts, String(value ?? ''));
  }
  const box = make('div', 'lanes', page.body);
  view.lanes.forEach((lane, i) => {
    const card = make('article', '', box);
    make('h2', '', card, lane.name);
    const sasa = marks.of(lane.name, 'sasa'), judged = lane.badge && lane.badge.p !== null;
    make('p', 'muted', card, [STATES[lane.state], lane.chips.map(chip => chip.label).join(' · '), judged ? badgeText(lane) : ''].filter(Boolean).join(' · '));
    if (judged && sasa !== undefined) make('p', 'muted', card, `Re-marked: ${badgeText(lane, sasa)}`);
    const answer = make('p', 'answer', card);
    lane.tokens.forEach((token, k) => {
      if (lane.marks.some(mark => mark.type === 'injection' && mark.token === k)) make('span', 'flag', answer, '▲ reminder');
      make('span', line !== null && lane.harm[k] !== null && lane.harm[k] >= line ? 'over' : '', answer, token);
    });
    const drawing = columns[i].plot.cloneNode(true);
    drawing.removeAttribute('class');
    card.append(page.adoptNode(drawing));
    make('p', '', card, lane.summary);
    const again = summaryText(lane, view);
    if (again !== lane.summary) make('p', '', card, again);
    make('p', 'muted', card, columns[i].speed.textContent);
  });
  make('p', 'muted', page.body, 'Harm probabilities come from a small detector and can be wrong both ways. For research on model safety: nothing here is advice.');
  return '<!doctype html>\n' + page.documentElement.outerHTML;
}

keepBox.querySelector('.save-json').addEventListener('click', () => {
  const {props, __type__, ...view} = shown;  // Gradio leaves these two in some updates
  if (moved(view)) view.remarked = {alarm: alarmOf(view), thresholds: marks.moved};
  offer(`safety-${stamp(view)}.json`, 'application/json', JSON.stringify(view, null, 1));
});
keepBox.querySelector('.save-html').addEventListener('click', () =>
  offer(`safety-${stamp(shown)}.html`, 'text/html', pageOf(shown)));
keepBox.querySelector('.save-link').addEventListener('click', () => {
  const answer = {};
  window.dispatchEvent(new CustomEvent('safety:link', {detail: answer}));
  const show = () => setText(kept, answer.link);  // without a clipboard, the link itself
  if (navigator.clipboard) navigator.clipboard.writeText(answer.link).then(() => setText(kept, answer.told), show);
  else show();
});
