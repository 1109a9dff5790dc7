// Where safe and unsafe requests part inside the model, for this very request: P(harm) behind every block.
const layersBox = find('.layers');
const TRUSTED = 0.8;  // AUROC from which a block's probe is believed
let layersDrawn = '';

function drawLayers(view) {
  const values = view.layers, trust = view.about.layer_auroc || [];
  layersBox.hidden = !values && !trust.length;  // there from the run's start, so that nothing jumps when it is drawn
  const key = JSON.stringify([view.run, values]);
  if (!values || key === layersDrawn) return;
  layersDrawn = key;
  const plot = layersBox.querySelector('svg'), cell = Math.max(12, (plot.clientWidth || 900) / values.length), height = 56;
  plot.setAttribute('viewBox', `0 0 ${values.length * cell} ${height + 14}`);
  plot.setAttribute('preserveAspectRatio', 'none');
  plot.replaceChildren();
  values.forEach((p, block) => {
    const bar = svg('rect', {class: p >= 0.5 ? 'unsafe' : 'safe', x: block * cell + 2, width: cell - 4, y: height * (1 - Math.max(p, 0.5)),
                             height: Math.max(1.5, height * Math.abs(p - 0.5)), opacity: 0.25 + 1.5 * Math.max(0, (trust[block] ?? 1) - 0.5)}, plot);
    svg('title', {}, bar).textContent = `block ${block}: ${p.toFixed(2)}` + (trust[block] ? `, right on held-out requests with AUROC ${trust[block].toFixed(2)}` : '');
    if (block % 5 === 0) svg('text', {class: 'tick', x: (block + 0.5) * cell, y: height + 11, 'text-anchor': 'middle'}, plot).textContent = block;
  });
  svg('line', {class: 'grid', x1: 0, x2: values.length * cell, y1: height / 2, y2: height / 2}, plot);
  const trusted = values.map((p, block) => (trust[block] ?? 1) >= TRUSTED ? p : -1), peak = trusted.indexOf(Math.max(...trusted));
  const words = `P(harm) behind each block, 0 to ${values.length - 1}: up is harmful, down is safe, faint where the block's probe is little better than chance. `
    + (trusted[peak] < 0 ? 'No block\'s probe can be relied on here.' : `Highest behind block ${peak}: ${values[peak].toFixed(2)}`
      + (trust.length ? ` (of those right on held-out requests, AUROC ≥ ${TRUSTED}).` : '.'));
  setText(layersBox.querySelector('figcaption span'), words);
  plot.setAttribute('aria-label', words);
}
