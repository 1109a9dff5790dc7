// Drawing: a view in, the columns as they should look.
function paint(view) {
  if (!view || !view.lanes) return;
  const unlike = columns.some((column, i) => {
    const lane = view.lanes[i];
    return lane && (lane.tokens.length < column.shown || (column.covered !== null && lane.covered === null));
  });
  shown = view;
  if (view.run !== run || view.lanes.length !== columns.length || unlike) rebuild(view);
  drawKnob(view);
  view.lanes.forEach((lane, i) => {
    const column = columns[i];
    column.lane = lane;
    column.covered = lane.covered;
    const ends = column.card.dataset.state !== lane.state && ENDED.includes(lane.state);
    if (column.card.dataset.state !== lane.state) column.card.dataset.state = lane.state;
    setText(column.state, STATES[lane.state]);
    setText(column.placeholder, lane.tokens.length ? '' : placeholderText(lane));
    column.cover.hidden = lane.covered === null;
    drawBadge(column.badge, lane);
    addTokens(column, lane);
    if (ends) toTheTop(column);
    if (column.width) drawTrace(column, lane, view);
    setText(column.summary, summaryText(lane, view));
    const work = lane.overhead === null || !lane.speed ? '' : lane.defended ? ` · +${(100 * lane.overhead).toFixed(lane.overhead < 0.1 ? 1 : 0)} % work` : ' · baseline';
    setText(column.speed, lane.speed + work);
    column.speed.title = work && lane.defended ? 'Counted: blocks times positions that this lane computed beyond an undefended answer of the same length' : '';
  });
  setText(find('.verdict'), view.verdict || (view.run === 'empty' ? 'Pick an example or ask something: what happens is said here in plain words.' : view.lanes.some(lane => ['error', 'memory'].includes(lane.state)) ? 'This run failed.' : view.lanes.some(lane => lane.state === 'queued') ? 'Waiting in line …' : 'Running …'));
  const asked = find('.asked');
  asked.hidden = !view.about.prompt;
  setText(asked, asked.hidden ? '' : `Asked: ${titleOf(view)}`);
  asked.title = view.about.prompt || '';
  find('.int8').hidden = !(view.about.model || '').includes('int8');
  drawLayers(view);
  drawKeep(view);
  remember(view);
}

// At most one drawing per frame, however many updates arrived: a slow browser skips frames instead of falling behind.
let waiting = false;
function schedule() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; paint(replayed(props.value)); });
}
watch('value', schedule);
paint(props.value);
