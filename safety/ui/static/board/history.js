// The session's runs, in this tab alone; in the browser's own storage only if the visitor asks for it.
const historyBox = find('.history'), historyList = historyBox.querySelector('ol'), compareBox = historyBox.querySelector('.compare');
const rememberBox = historyBox.querySelector('.remember input');
const STORE = 'safety-side-by-side', MOST = 20;
let past = [], picked = [];

try {
  past = JSON.parse(localStorage.getItem(STORE)) || [];
  rememberBox.checked = localStorage.getItem(STORE) !== null;
} catch (error) { past = []; }

function store() {
  try {
    if (rememberBox.checked) localStorage.setItem(STORE, JSON.stringify(past));
    else localStorage.removeItem(STORE);
  } catch (error) { rememberBox.checked = false; }  // storage is full or forbidden: the tab still has them
}

function remember(view) {
  if (view.run === 'empty' || view.recording || !view.lanes.every(lane => ENDED.includes(lane.state))) return;
  const known = past.find(old => old.run === view.run);
  if (known && known.lanes.every((lane, i) => lane.covered === view.lanes[i].covered)) return;
  past = [structuredClone(view), ...past.filter(old => old.run !== view.run)].slice(0, MOST);
  store();
  listRuns();
}

// What tells runs apart: several examples have the same prompt.
function titleOf({about}) {
  const what = about.example || (about.image || '').replace(/, \d+ × \d+$/, '');
  return (what ? what + ': ' : '') + (about.prompt || 'no prompt');
}

function listRuns() {
  historyBox.hidden = !past.length;
  historyList.replaceChildren();
  past.forEach((view, i) => {
    const row = html('li', '', historyList), pick = html('label', 'pick', row);
    const box = html('input', '', pick);
    box.type = 'checkbox';
    box.checked = picked.includes(view.run);
    box.setAttribute('aria-label', `Compare run ${past.length - i}`);
    const words = html('span', 'words', row);
    html('b', '', words, titleOf(view));
    html('span', '', words, view.verdict);
    html('small', '', row, `${(view.about.date || '').slice(11, 16)} · ${view.about.model || ''} · ${view.lanes.length} column${view.lanes.length > 1 ? 's' : ''}`);
    box.addEventListener('change', () => {
      picked = box.checked ? [...picked, view.run].slice(-2) : picked.filter(run => run !== view.run);
      listRuns();
      historyList.children[i].querySelector('input').focus();
    });
  });
  compareRuns();
}

function compareRuns() {
  const two = picked.map(run => past.find(view => view.run === run)).filter(Boolean);
  compareBox.hidden = !two.length;
  compareBox.replaceChildren();
  for (const view of two) {
    const side = html('section', 'side', compareBox);
    html('h3', '', side, titleOf(view));
    html('p', 'muted', side, `${view.about.model || ''} · ${view.about.image || 'no image'} · ${(view.about.date || '').replace('T', ' ').slice(0, 16)}`);
    html('p', '', side, view.verdict);
    for (const lane of view.lanes) {
      html('h4', '', side, `${lane.name}: ${lane.chips.map(chip => chip.label).join(' · ')}`);
      html('p', 'said', side, lane.tokens.join(''));
      html('p', 'muted', side, lane.summary);
    }
  }
  if (two.length === 1) html('p', 'muted', compareBox, 'Tick a second run to see both side by side.');
}

rememberBox.addEventListener('change', store);
historyBox.querySelector('.forget').addEventListener('click', () => {
  past = [];
  picked = [];
  rememberBox.checked = false;
  store();
  listRuns();
});
listRuns();
