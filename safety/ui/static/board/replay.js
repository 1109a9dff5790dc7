// Recordings: a finished view with the second at which each token came. Played here, at the pace of the real run.
const recordingBox = find('.recording');
const playing = {run: null, since: 0, done: false};

function replayed(view) {
  const recording = view && view.recording;
  recordingBox.hidden = !recording;
  if (!recording) return view;
  setText(recordingBox.querySelector('span'), `of ${recording.model}, made ${recording.date}, commit ${recording.commit}. No model is running.`);
  if (playing.run !== view.run) Object.assign(playing, {run: view.run, since: performance.now(), done: false});
  const now = (performance.now() - playing.since) / 1000;
  if (!playing.done && recording.times.every(times => !times.length || times[times.length - 1] <= now)) playing.done = true;
  if (playing.done) return view;
  requestAnimationFrame(schedule);
  return {...view, verdict: '', lanes: view.lanes.map((lane, i) => {
    const count = recording.times[i].filter(time => time <= now).length, ended = count === lane.tokens.length;
    if (ended) return lane;
    return {...lane, state: count ? 'streaming' : 'waiting', wait: 'Reading the prompt …', summary: '', speed: '', overhead: null,
            tokens: lane.tokens.slice(0, count), harm: lane.harm.slice(0, count), marks: lane.marks.filter(mark => mark.token < count),
            badge: count || !lane.badge ? lane.badge : {...lane.badge, p: null}};
  })};
}
recordingBox.querySelector('.again').addEventListener('click', () => { playing.run = null; schedule(); });
recordingBox.querySelector('.skip').addEventListener('click', () => { playing.done = true; schedule(); });
