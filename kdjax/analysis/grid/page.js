'use strict';
const D = JSON.parse(document.getElementById('data').textContent);
const number = v => v === 'inf' ? Infinity : v === '-inf' ? -Infinity : v;
const rows = (() => {
  const names = Object.keys(D.effects), out = [];
  for (const name of names) {
    const {values, index} = D.effects[name];
    (index ? index.map(i => values[i]) : values).forEach((v, k) => { (out[k] ??= {id: k})[name] = number(v); });
  }
  return out;
})();
const FILTERS = {
  student: ['Student', r => r.setting], teacher: ['Teacher', r => r.teacher || 'none'], budget: ['Teacher budget', r => r.budget_name],
  alpha: ['Alpha', r => String(r.alpha)], set: ['Set', r => r.set], measure: ['Measure', r => r.measure], arm: ['Arm', r => r.arm],
};
const TASKS = new Set(['accuracy', 'accuracy_norm']);
const GREY = '#4c4c4c', DARK = '#1d2328';
let state = {}, sorting = ['', 1], drawing = 0;

// State: the hash is the only place where it is kept.
function readHash() {
  const given = new URLSearchParams(location.hash.slice(1));
  state = {};
  for (const name of Object.keys(FILTERS)) {
    const value = given.get(name);
    if (value && D.options[name].includes(value)) state[name] = value;
  }
}
function writeHash() {
  const text = new URLSearchParams(state).toString().replaceAll('+', '%20');
  if (text) location.hash = text;
  else if (location.hash) { history.replaceState(null, '', location.pathname + location.search); refresh(); }
}
const passes = r => Object.entries(state).every(([name, value]) => FILTERS[name][1](r) === value);

// In figures set and measure choose panels and axes, and controls that have no teacher, or no alpha, stay.
function forFigures(setting) {
  const about = (name, r) => !state[name] || FILTERS[name][1](r) === state[name];
  return rows.filter(r => r.setting === setting && about('arm', r)
    && (about('alpha', r) || ['tuned', 'flop_matched'].includes(r.arm))
    && ((about('teacher', r) && about('budget', r)) || r.teacher === ''));
}

// Words and small numbers
const esc = text => String(text).replace(/[&<>"]/g, c => ({'&': '&amp;', '<': '&lt;', '>': '&gt;', '"': '&quot;'}[c]));
const unique = list => [...new Set(list)];
const finite = v => typeof v === 'number' && isFinite(v);
const signed = v => !finite(v) ? (v === Infinity ? '+∞' : v === -Infinity ? '-∞' : '') : (v >= 0 ? '+' : '') + (Math.abs(v) < 1e-3 || Math.abs(v) >= 1e4 ? v.toExponential(2) : v.toFixed(4));
function count(n) {
  for (const [unit, size] of [['T', 1e12], ['B', 1e9], ['M', 1e6], ['k', 1e3]]) if (n >= size) return `${+(n / size).toPrecision(4)}${unit}`;
  return String(n);
}
const flops = n => n.toExponential(1).replace('e+', 'e');
const label = r => `${r.source}, α ${r.alpha}${r.validated ? '' : '*'}`;
const who = r => r.arm === 'distilled' ? r.source : r.arm === 'unigram' ? 'unigram (no teacher)' : r.arm === 'tuned' ? 'LM-only, tuned' : r.arm === 'equal_compute' ? `${r.source}, on more tokens` : `LM-only, FLOPs of ${r.source}`;
function tip(r, extra = '') {
  const cells = r.cells.split(' ').filter(Boolean), unit = D.units[r.measure][0];
  return [
    `<b>${esc(who(r))}</b>, α ${r.alpha}${r.validated ? ', validated' : ''}${r.scenario ? `, at equal FLOPs (${esc(r.scenario)})` : ''}`,
    `${esc(r.set)}: ${signed(r.estimate)} [${signed(r.low)}, ${signed(r.high)}]`, `${esc(unit)}, less the baseline’s`,
    ...(extra ? [extra] : []), `seeds ${esc(r.seeds)}; ${r.n_documents} documents; interval over ${esc(r.over)}`,
    ...cells.slice(0, 6).map(c => `<small>${esc(c)}</small>`), ...(cells.length > 6 ? [`and ${cells.length - 6} cells more`] : []),
  ].join('<br>');
}
const axisTitle = (measure, per = '', gap = ' ') => `${D.units[measure][0]}${per},<br>less the LM-only student’s${D.units[measure][1] ? gap + D.units[measure][1] : ''}`;

// Which rows: the rules of kdjax/analysis/grid/table_rows.py
function controls(list, beside) {
  const alike = list.filter(r => r.arm === 'unigram' && r.validated === beside.validated), same = alike.filter(r => r.alpha === beside.alpha);
  return beside.validated && !same.length ? alike : same;
}
const plain = list => list.filter(r => r.arm === 'distilled' && !r.scenario);
const isTask = set => rows.some(r => r.set === set && r.group === 'downstream');
const measureOf = set => state.measure || (isTask(set) ? 'accuracy' : 'bits_per_byte');
const bySize = (a, b) => a.teacher_params - b.teacher_params || a.teacher_tokens - b.teacher_tokens || (a.variant < b.variant ? -1 : a.variant > b.variant ? 1 : 0);
function setsShown() {
  if (state.set) return [state.set];
  return TASKS.has(state.measure) ? D.options.set.filter(isTask) : D.sets;
}
const on = (list, set) => list.filter(r => r.set === set && r.measure === measureOf(set));
function chosen(list) {
  const groups = new Map();
  for (const r of plain(list)) groups.has(r.source) ? groups.get(r.source).push(r) : groups.set(r.source, [r]);
  return [...groups.values()].flatMap(group => {
    if (group.some(r => r.validated)) return group.filter(r => r.validated);
    const alphas = unique(group.map(r => r.alpha)).sort((a, b) => a - b);
    return group.filter(r => r.alpha === alphas[(alphas.length - 1) >> 1]);
  }).sort(bySize);
}
const teachersOf = list => unique(list.filter(r => r.arm === 'distilled').sort((a, b) => a.teacher_params - b.teacher_params).map(r => r.teacher));

// Traces
const arm = (r, end, name) => { const v = Math.abs(r[end] - r[name]); return finite(v) ? v : 0; };
const bars = (list, scale = () => 1) => ({
  type: 'data', symmetric: false, thickness: 1, width: 3,
  array: list.map(r => arm(r, 'high', 'estimate') * scale(r)), arrayminus: list.map(r => arm(r, 'low', 'estimate') * scale(r)),
});
const points = (list, x, style) => ({
  type: 'scatter', mode: 'markers', x: list.map(x), y: list.map(r => r.estimate), error_y: {...bars(list), color: style.marker.color},
  tips: list.map(r => tip(r)), hoverinfo: 'none', ...style,
});
const mark = (symbol, color, size, hollow, edge) => ({symbol: symbol + (hollow ? '-open' : ''), color, size, line: {color: edge || color, width: hollow ? 1.6 : edge ? 1.2 : 0}});
const AXIS = {gridcolor: '#e8ebee', zeroline: false, linecolor: '#aab2b9', mirror: true, automargin: true, ticks: 'outside', tickcolor: '#aab2b9', title: {font: {size: 11}, standoff: 8}};
const axis = (title, more = {}) => ({...AXIS, ...more, title: {...AXIS.title, text: title}});
const zero = (across) => ({type: 'line', layer: 'between', line: {color: GREY, width: 1.3}, ...(across ? {xref: 'paper', x0: 0, x1: 1, y0: 0, y1: 0} : {yref: 'paper', y0: 0, y1: 1, x0: 0, x1: 0})});
const layout = (height, x, y, more = {}) => ({
  height, margin: {l: 20, r: 10, t: 28, b: 20}, font: {family: 'system-ui, Segoe UI, Roboto, Arial, sans-serif', size: 11, color: DARK}, paper_bgcolor: '#fff', plot_bgcolor: '#fff',
  showlegend: false, hovermode: 'closest', xaxis: x, yaxis: y, ...more,
});
const key = (text, symbol, color, {hollow = false, dash = ''} = {}) => ({text, symbol, color, hollow, dash});

function forest(list, labels, slots, {x = r => r.estimate, scale = () => 1, title, numbers = false, rowHeight = 34}) {
  const groups = new Map();
  for (const p of list) {
    const id = [p.color, p.symbol, p.hollow].join();
    groups.has(id) ? groups.get(id).push(p) : groups.set(id, [p]);
  }
  const at = p => labels.indexOf(p.label) + (p.slot - (slots - 1) / 2) * 0.7 / slots;
  const traces = [...groups.values()].map(part => ({
    type: 'scatter', mode: 'markers', x: part.map(p => x(p.row)), y: part.map(at), tips: part.map(p => tip(p.row, p.extra)), hoverinfo: 'none',
    error_x: {...bars(part.map(p => p.row), scale), color: part[0].color}, marker: mark(part[0].symbol, part[0].color, 8, part[0].hollow),
  }));
  const between = labels.slice(1).map((_, i) => ({type: 'line', layer: 'below', xref: 'paper', x0: 0, x1: 1, y0: i + 0.5, y1: i + 0.5, line: {color: '#e1e5e8', width: 1}}));
  const annotations = numbers ? list.map(p => ({xref: 'paper', x: 1, xanchor: 'left', y: labels.indexOf(p.label), text: (x(p.row) >= 0 ? '+' : '') + x(p.row).toPrecision(3), showarrow: false, font: {size: 10}})) : [];
  const y = axis('', {tickvals: labels.map((_, i) => i), ticktext: labels.map(esc), range: [labels.length - 0.4, -0.6], showgrid: false, tickfont: {size: 10.5}, fixedrange: true});
  return {traces, layout: layout(labels.length * rowHeight + 124, axis(title, {nticks: 5, tickangle: 0}), y, {shapes: [zero(false), ...between], annotations, margin: {l: 20, r: numbers ? 62 : 10, t: 28, b: 20}})};
}

// Sorted places in [0, 1], moved as little as least squares can until neighbours are `gap` apart (pool adjacent violators)
function spread(places, gap) {
  const blocks = [];
  places.forEach((p, i) => {
    blocks.push({sum: p - i * gap, n: 1});
    while (blocks.length > 1 && blocks.at(-2).sum / blocks.at(-2).n > blocks.at(-1).sum / blocks.at(-1).n) {
      const last = blocks.pop();
      blocks.at(-1).sum += last.sum; blocks.at(-1).n += last.n;
    }
  });
  const top = Math.max(0, 1 - gap * (places.length - 1));
  return blocks.flatMap(b => Array(b.n).fill(b.sum / b.n)).map((v, i) => Math.min(Math.max(v, 0), top) + i * gap);
}

// The figures: rows of a setting -> {panels: [{title, traces, layout}], keys, used}
const FIGURES = {
  gain_vs_teacher(list) {
    const all = setsShown().flatMap(set => on(plain(list), set));
    const series = unique(all.map(r => r.validated ? `v|${r.variant}` : `${r.alpha}|${r.variant}`)).sort();
    const variants = unique(all.map(r => r.variant)).sort();
    const style = name => {
      const [alpha, variant] = name.split('|'), dash = D.dashes[variants.indexOf(variant) % D.dashes.length];
      return alpha === 'v' ? {marker: {...mark('star', '#000', 12, true)}} : {mode: 'lines+markers', line: {color: D.alphas[alpha], width: 1.5, dash}, marker: mark('circle', D.alphas[alpha], 6)};
    };
    const nameOf = r => `${r.teacher} ${count(r.teacher_tokens)} · ${flops(r.strength)}`;
    const known = [...new Map(all.map(r => [nameOf(r), r])).values()].sort((a, b) => a.strength - b.strength);
    const places = known.map(r => Math.log10(r.strength)), span = Math.max(...places) - Math.min(...places) || 1;
    const lo = Math.min(...places) - 0.06 * span, hi = Math.max(...places) + 0.06 * span;
    const gap = Math.min(0.045, 1 / Math.max(known.length - 1, 1)), moved = spread(places.map(p => (p - lo) / (hi - lo)), gap).map(p => lo + p * (hi - lo));
    const deep = 20 + 5.6 * Math.max(...known.map(r => nameOf(r).length));
    const panels = setsShown().map(set => {
      const mine = on(all, set);
      const traces = series.map((name, i) => {
        const part = mine.filter(r => name === (r.validated ? `v|${r.variant}` : `${r.alpha}|${r.variant}`)).sort((a, b) => a.strength - b.strength);
        return points(part, r => Math.log10(r.strength) + Math.min(0.011, 0.6 / (known.length * series.length)) * span * (i - (series.length - 1) / 2), style(name));
      });
      const lines = known.map((r, i) => ({type: 'line', xref: 'x', yref: 'paper', x0: places[i], x1: moved[i], y0: 0, y1: -0.03, line: {color: r.colour, width: 1.5}}));
      const names = known.map((r, i) => ({xref: 'x', yref: 'paper', x: moved[i], y: -0.035, yanchor: 'top', xanchor: 'center', textangle: -90, showarrow: false, font: {size: known.length > 16 ? 8 : 10, color: DARK}, text: esc(nameOf(r))}));
      const title = {xref: 'paper', yref: 'paper', x: 0.5, y: 0, yshift: -deep - 8, yanchor: 'top', showarrow: false, font: {size: 11}, text: 'teacher, its tokens ·<br>FLOPs of its training (log scale)'};
      const x = {...AXIS, range: [lo - 0.03 * span, hi + 0.03 * span], showticklabels: false, ticks: '', showgrid: false};
      return {title: set, traces, empty: !mine.length, layout: layout(334 + deep, x, axis(axisTitle(measureOf(set))), {shapes: [zero(true), ...lines], annotations: [...names, title], margin: {l: 20, r: 10, t: 28, b: deep + 44}})};
    });
    const keys = series.map(name => {
      const [alpha, variant] = name.split('|'), s = style(name);
      return alpha === 'v' ? key(`validated α, fresh seeds ${variant}`, 'star', '#000', {hollow: true}) : key(`α ${alpha} ${variant}`, 'circle', D.alphas[alpha], {dash: s.line.dash});
    });
    return {panels, keys, used: all};
  },

  size_by_budget(list) {
    const all = setsShown().flatMap(set => on(chosen(list), set));
    const teachers = teachersOf(all), budgets = unique(all.map(r => r.teacher_tokens)).sort((a, b) => a - b);
    const panels = unique(all.map(r => r.variant)).sort().flatMap(variant => setsShown().map(set => {
      const mine = on(all, set).filter(r => r.variant === variant), limit = Math.max(...on(all, set).map(r => Math.abs(r.estimate)), 1e-9);
      const table = what => teachers.map(t => budgets.map(b => { const r = mine.find(r => r.teacher === t && r.teacher_tokens === b); return r ? what(r) : null; }));
      const colours = ['#053061', '#4393c3', '#f7f7f7', '#d6604d', '#67001f'];
      const up = D.units[measureOf(set)][1].includes('above');
      const scale = (up ? [...colours].reverse() : colours).map((c, i) => [i / 4, c]);
      const page = document.getElementById('plots').clientWidth, room = ((budgets.length > 3 || page < 900 ? page : page / 2) - 180) / budgets.length;
      const long = r => `${signed(r.estimate)}<br>[${signed(r.low)}, ${signed(r.high)}]<br>α ${r.alpha}${r.validated ? '' : '*'}`;
      const cell = r => room > 105 ? long(r) : room > 48 ? `${signed(r.estimate)}<br>α ${r.alpha}${r.validated ? '' : '*'}` : '';  // all is in the hover text
      const missing = teachers.flatMap((t, y) => budgets.flatMap((b, x) => mine.some(r => r.teacher === t && r.teacher_tokens === b) ? [] : [{x, y, text: 'not run', showarrow: false}]));
      const words = mine.map(r => ({x: budgets.indexOf(r.teacher_tokens), y: teachers.indexOf(r.teacher), text: cell(r), showarrow: false, captureevents: false, font: {size: 10.5, color: Math.abs(r.estimate) > 0.62 * limit ? '#fff' : '#000'}}));
      const traces = [{type: 'heatmap', z: table(r => r.estimate), x: budgets.map((_, i) => i), y: teachers.map((_, i) => i), tips: table(r => tip(r)), hoverinfo: 'none', zmin: -limit, zmax: limit, colorscale: scale, xgap: 2, ygap: 2, colorbar: {title: {text: axisTitle(measureOf(set)), side: 'right', font: {size: 10}}, thickness: 12, tickfont: {size: 10}}}];
      const x = axis('teacher’s training tokens', {tickvals: budgets.map((_, i) => i), ticktext: budgets.map(count), showgrid: false});
      const y = axis('', {tickvals: teachers.map((_, i) => i), ticktext: teachers.map(esc), showgrid: false});
      return {title: `${set} ${variant}`, wide: budgets.length > 3 ? '700px' : '', traces, empty: !mine.length, layout: layout(Math.max(300, 78 * teachers.length + 70), x, y, {annotations: [...words, ...missing], plot_bgcolor: '#eef0f2'})};
    }));
    return {panels, keys: [], used: all};
  },

  alpha_curves(list) {
    const all = setsShown().flatMap(set => on(plain(list), set)), teachers = teachersOf(all);
    const control = all.length ? setsShown().flatMap(set => on(list, set).filter(r => r.arm === 'unigram' && !r.validated)) : [];
    const uses = unique(all.map(r => `${r.teacher_tokens}|${r.variant}`)).sort((a, b) => parseFloat(a) - parseFloat(b) || (a < b ? -1 : 1));
    const panels = setsShown().flatMap(set => {
      const mine = on(all, set), beside = on(control, set).sort((a, b) => a.alpha - b.alpha);
      const range = limits(mine, beside);
      return teachers.map(teacher => {
        const traces = beside.length ? [points(beside, r => r.alpha, {mode: 'lines+markers', opacity: 0.65, line: {color: D.arms.unigram[1], width: 1}, marker: mark('triangle-right', D.arms.unigram[1], 7)})] : [];
        const of = mine.filter(r => r.teacher === teacher);
        uses.forEach((use, i) => {
          const part = of.filter(r => `${r.teacher_tokens}|${r.variant}` === use).sort((a, b) => a.alpha - b.alpha), shift = Math.min(0.016, 0.06 / uses.length) * (i - (uses.length - 1) / 2);
          const curve = part.filter(r => !r.validated), best = part.filter(r => r.validated), symbol = D.symbols[i % D.symbols.length];
          if (curve.length) {
            const dash = D.dashes[i % D.dashes.length], color = shade(curve[0].colour, i, uses.length);
            traces.push({type: 'scatter', mode: 'lines', hoverinfo: 'skip', x: [0, curve[0].alpha + shift], y: [0, curve[0].estimate], line: {color, width: 1.5, dash}});
            traces.push(points(curve, r => r.alpha + shift, {mode: 'lines+markers', line: {color, width: 1.5, dash}, marker: mark(symbol, color, 6)}));
          }
          if (best.length) traces.push(points(best, r => r.alpha + shift, {marker: {symbol, color: '#fff', size: 11, line: {color: '#000', width: 1.6}}, error_y: {...bars(best), color: shade(best[0].colour, i, uses.length)}}));
        });
        const x = axis('alpha (0: LM-only)', {range: [-0.06, Math.max(...all.map(r => r.alpha), 0.5) + 0.08], tickvals: unique([0, ...all.map(r => r.alpha)]), tickangle: 0, tickfont: {size: 9.5}});
        return {title: `${teacher} · ${set}`, narrow: true, traces, empty: !of.length, layout: layout(310, x, axis(axisTitle(measureOf(set)), {range}), {shapes: [zero(true)]})};
      });
    });
    const keys = uses.map((use, i) => { const [tokens, variant] = use.split('|'); return key(`teacher’s tokens ${count(+tokens)} ${variant}`, D.symbols[i % D.symbols.length], '#555', {dash: D.dashes[i % D.dashes.length]}); });
    keys.push(key('large, hollow: validated α, fresh seeds', 'circle', '#000', {hollow: true}));
    if (control.length) keys.push(key('unigram (no teacher)', 'triangle-right', D.arms.unigram[1], {dash: 'solid'}));
    return {panels, keys, used: [...all, ...control]};
  },

  gains_by_set(list) {
    const pairs = Object.entries(D.fitted), measured = list.filter(r => state.measure ? r.measure === state.measure : pairs.flat().includes(r.measure)).filter(r => !state.set || r.set === state.set);
    const hollow = r => pairs.some(([, fitted]) => fitted === r.measure);
    const own = chosen(measured), labels = unique(own.map(label)), placed = [];
    for (const r of own) placed.push({row: r, label: label(r), slot: +hollow(r), color: r.colour, symbol: r.marker, hollow: hollow(r)});
    for (const name of labels) {
      const first = own.find(r => label(r) === name);
      for (const r of controls(measured, first)) placed.push({row: r, label: name, slot: 2 + hollow(r), color: r.colour, symbol: 'triangle-right', hollow: hollow(r)});
    }
    for (const r of own.length ? measured : []) if (r.arm === 'tuned') placed.push({row: r, label: 'LM-only, tuned', slot: +hollow(r), color: GREY, symbol: 'x', hollow: hollow(r)});
    const all = unique(placed.map(p => p.label));
    const panels = D.options.set.filter(set => placed.some(p => p.row.set === set)).map(set => {
      const mine = placed.filter(p => p.row.set === set);
      const measure = state.measure || pairs.map(([raw]) => raw).find(m => mine.some(p => p.row.measure === m)) || mine[0].row.measure;
      return {title: set, ...forest(mine, all, 4, {title: axisTitle(measure, '', '<br>'), rowHeight: 38})};
    });
    const keys = [key('teacher (in its colour): T = 1; tasks: raw log-likelihood', 'circle', '#555'), key('the same at fitted T; tasks: per byte', 'circle', '#555', {hollow: true}),
      ...(placed.some(p => p.row.arm === 'unigram') ? [key('unigram, T = 1', 'triangle-right', D.arms.unigram[1]), key('unigram at fitted T', 'triangle-right', D.arms.unigram[1], {hollow: true})] : []),
      ...(placed.some(p => p.row.arm === 'tuned') ? [key('LM-only, tuned', 'x', GREY)] : [])];
    return {panels, keys, used: placed.map(p => p.row)};
  },

  entropy_vs_perplexity(list) {
    const measure = ['bits_per_byte_fitted', 'top1', 'ece'].includes(state.measure) ? state.measure : 'bits_per_byte';
    const sets = state.set ? [state.set] : D.sets, same = r => [r.setting, r.arm, r.source, r.alpha, r.validated, r.scenario, r.cells, r.set].join('|');
    const arms = list.filter(r => (!r.scenario || r.arm === 'flop_matched') && sets.includes(r.set));
    const entropy = new Map(arms.filter(r => r.measure === 'entropy').map(r => [same(r), r]));
    const all = arms.filter(r => r.measure === measure && entropy.has(same(r)));
    const panels = sets.map(set => {
      const mine = all.filter(r => r.set === set), h = r => entropy.get(same(r));
      const kinds = unique(mine.map(r => `${r.arm}|${r.arm === 'distilled' ? r.colour : D.arms[r.arm][1]}`));
      const traces = kinds.map(kind => {
        const [arm_, color] = kind.split('|'), part = mine.filter(r => r.arm === arm_ && (r.arm !== 'distilled' || r.colour === color)), hs = part.map(h);
        const edge = part.map(r => r.validated && ['distilled', 'unigram'].includes(r.arm) ? '#000' : color);
        return {type: 'scatter', mode: 'markers', x: hs.map(e => e.estimate), y: part.map(r => r.estimate), error_x: {...bars(hs), thickness: 0.5, width: 0, color}, error_y: {...bars(part), thickness: 0.5, width: 0, color},
          tips: part.map((r, i) => tip(r, `entropy ${signed(hs[i].estimate)} [${signed(hs[i].low)}, ${signed(hs[i].high)}] nats per token`)), hoverinfo: 'none',
          marker: {symbol: D.arms[arm_][0], color, opacity: 1, size: part.map(r => 6 + 7 * r.alpha), line: {color: edge, width: 1.3}}};
      });
      const y = (measure === 'bits_per_byte' ? 'log2 perplexity per byte = ' : '') + axisTitle(measure);
      return {title: set, traces, empty: !mine.length, layout: layout(430, axis('entropy, nats per token, less the LM-only student’s<br>(right of 0: less sure)'), axis(y), {shapes: [zero(true), zero(false)]})};
    });
    const keys = teachersOf(all).map(t => key(t, 'circle', all.find(r => r.teacher === t && r.arm === 'distilled').colour));
    for (const [arm_, text] of [['unigram', 'unigram (no teacher)'], ['tuned', 'LM-only, tuned'], ['flop_matched', 'LM-only, FLOP-matched']]) if (all.some(r => r.arm === arm_)) keys.push(key(text, ...D.arms[arm_]));
    keys.push(key('black edge: validated α; larger: higher α', 'circle', '#000', {hollow: true}));
    return {panels, keys, used: all};
  },

  gain_per_flop(list) {
    const sets = setsShown(), own = sets.flatMap(set => on(chosen(list), set)), used = [], panels = [];
    const matched = own.length ? sets.flatMap(set => on(list, set).filter(r => r.arm === 'flop_matched')).sort((a, b) => a.student_flops - b.student_flops) : [];
    const labels = unique(own.map(label)), budgets = unique(own.map(r => r.teacher_tokens)).sort((a, b) => a - b), later = [];
    for (const [counted, words] of own.length ? Object.entries(D.counted) : []) {
      const teacher = r => r.logits_flops + (counted.includes('pretraining') ? r.pretraining_flops : 0);
      const costs = own.map(teacher).sort((a, b) => a - b), middle = (costs[(costs.length - 1) >> 1] + costs[costs.length >> 1]) / 2, unit = 10 ** Math.round(Math.log10(middle));
      used.push(...own, ...matched);
      for (const set of sets) {
        const mine = on(own, set), base = on(matched, set), measure = measureOf(set);
        const placed = mine.map(r => ({row: r, label: label(r), slot: 0, color: r.colour, symbol: r.marker, hollow: false, extra: `${signed(r.estimate / teacher(r) * unit)} per ${flops(unit)} of ${flops(teacher(r))} teacher FLOPs`}));
        const per = forest(placed, labels, 1, {x: r => r.estimate / teacher(r) * unit, scale: r => unit / teacher(r), title: axisTitle(measure, ` per ${flops(unit)} teacher FLOPs`, '<br>'), numbers: true, rowHeight: 28});
        panels.push({wide: '440px', title: `${set}: gain per teacher FLOP, counting ${words}`, empty: !mine.length, ...per});
        later.push({wide: '440px', title: `${set}: frontier, counting ${words}`, empty: !mine.length, ...frontierPanel(mine, base, teacher, measure, budgets)});
      }
    }
    const keys = teachersOf(own).map(t => { const r = own.find(r => r.teacher === t); return key(t, r.marker, r.colour); });
    keys.push(key('larger: more teacher tokens', '', '#555'), key('LM-only, the same student on more tokens', 'square', '#000', {dash: 'solid'}), key('thick: frontier, the best up to there', '', '#bbb', {dash: 'solid'}));
    return {panels: [...panels, ...later], keys, used};
  },

  equal_flops(list) {
    const sets = setsShown(), matched = sets.flatMap(set => on(list, set).filter(r => r.arm === 'distilled' && r.scenario)).sort(bySize);
    const all = matched.length ? [...sets.flatMap(set => on(chosen(list), set)), ...matched] : [];
    const labels = unique(all.map(label)), scenarios = Object.keys(D.scenarios).filter(s => all.some(r => r.scenario === s));
    const panels = sets.map(set => {
      const placed = on(all, set).map(r => ({row: r, label: label(r), slot: scenarios.indexOf(r.scenario), color: r.colour, symbol: D.scenarios[r.scenario], hollow: r.scenario !== ''}));
      const [unit, sense] = D.units[measureOf(set)];
      return {title: set, empty: !placed.length, ...forest(placed, labels, scenarios.length, {title: `${unit}, less that of the LM-only student<br>of equal tokens or equal FLOPs<br>${sense}`, rowHeight: 44})};
    });
    const keys = scenarios.map(s => key(s ? `less LM-only at equal FLOPs, counting ${s.replace('+', ' and ')}` : 'less LM-only at equal tokens', D.scenarios[s], '#555', {hollow: s !== ''}));
    return {panels, keys, used: all};
  },

  gain_by_difficulty(list) {
    const sets = state.set ? [state.set] : D.sets, measured = list.filter(r => r.measure in D.difficulty && sets.includes(r.set));
    const own = chosen(measured), uses = unique(own.map(r => `${r.teacher_tokens}|${r.variant}`)).sort((a, b) => parseFloat(a) - parseFloat(b) || (a < b ? -1 : 1)), labels = unique(own.map(label));
    const control = measured.filter(r => own.some(o => controls(measured, o).includes(r)));
    const at = r => D.difficulty[r.measure], ordered = list => [...list].sort((a, b) => at(a) - at(b));
    const style = r => { const i = uses.indexOf(`${r.teacher_tokens}|${r.variant}`), color = shade(r.colour, i, uses.length); return {mode: 'lines+markers', line: {color, width: 1.5, dash: D.dashes[i % D.dashes.length]}, marker: mark(r.marker, color, 6)}; };
    const panels = sets.map(set => {
      const beside = control.filter(r => r.set === set), mine = own.filter(r => r.set === set);
      const traces = unique(beside.map(r => `${r.alpha}|${r.validated}`)).map(use => points(ordered(beside.filter(r => `${r.alpha}|${r.validated}` === use)), at, {mode: 'lines+markers', opacity: 0.5, line: {color: D.arms.unigram[1], width: 1}, marker: mark('triangle-right', D.arms.unigram[1], 6)}));
      labels.forEach((name, i) => {
        const part = ordered(mine.filter(r => label(r) === name));
        if (part.length) traces.push(points(part, r => at(r) + 0.05 * (i - (labels.length - 1) / 2), style(part[0])));
      });
      const x = axis('tokens by frequency in the training text, a fifth of it each', {tickvals: Object.values(D.difficulty), ticktext: ['1: commonest', '2', '3', '4', '5: rarest']});
      return {title: set, traces, empty: !mine.length, layout: layout(380, x, axis('nats per token, less the LM-only student’s<br>(below 0: better)'), {shapes: [zero(true)]})};
    });
    const keys = labels.map(name => { const r = own.find(r => label(r) === name), s = style(r); return key(name, r.marker, s.line.color, {dash: s.line.dash}); });
    if (control.length) keys.push(key('unigram (no teacher)', 'triangle-right', D.arms.unigram[1], {dash: 'solid'}));
    return {panels, keys, used: [...own, ...control]};
  },
};

// Of the teachers' curves; the unigram's may leave them by as much again, lest it flatten them
function shade(colour, i, n) {  // paler for the smaller of a teacher's n budgets
  const white = 0.45 * (n - 1 - i) / Math.max(n - 1, 1);
  return `rgb(${[1, 3, 5].map(k => Math.round(255 * white + (1 - white) * parseInt(colour.slice(k, k + 2), 16)))})`;
}
function limits(mine, beside) {
  const ends = list => list.flatMap(r => [r.estimate, r.low, r.high]).filter(finite);
  const own = [0, ...ends(mine)], all = [...own, ...ends(beside)];
  const low = Math.min(...own), high = Math.max(...own), span = 1.05 * (high - low) || 1, margin = 0.05 * span;
  return [Math.max(Math.min(...all), low - span) - margin, Math.min(Math.max(...all), high + span) + margin];
}

function frontierPanel(mine, base, teacher, measure, budgets) {
  const at = r => r.student_flops + (r.arm === 'distilled' ? teacher(r) : 0), up = D.units[measure][1].includes('above') ? -1 : 1;
  const start = mine.length ? mine[0].student_flops : 1, cloud = [{x: start, y: 0}, ...[...mine, ...base].map(r => ({x: at(r), y: r.estimate}))].sort((a, b) => a.x - b.x || up * (a.y - b.y));
  const step = [], ticks = [];
  for (let power = Math.floor(Math.log10(cloud[0].x)); power <= Math.log10(cloud.at(-1).x); power++) ticks.push(...[1, 2, 5].map(digit => digit * 10 ** power));
  if (ticks.filter(v => v >= cloud[0].x && v <= cloud.at(-1).x).length < 2) ticks.splice(0, Infinity, cloud[0].x, cloud.at(-1).x);
  for (const p of cloud) if (!step.length || up * p.y < up * step.at(-1).y) step.push(p);
  step.push({x: cloud.at(-1).x, y: step.at(-1).y});
  const traces = [
    {type: 'scatter', mode: 'lines', hoverinfo: 'skip', x: step.map(p => p.x), y: step.map(p => p.y), line: {shape: 'hv', color: 'rgba(0,0,0,0.18)', width: 6}},
    {type: 'scatter', mode: 'lines', hoverinfo: 'skip', x: [start, ...base.map(at)], y: [0, ...base.map(r => r.estimate)], line: {color: '#000', width: 1}},
    {type: 'scatter', mode: 'markers', x: [start], y: [0], tips: ['the LM-only student itself: 0 by definition'], hoverinfo: 'none', marker: mark('square', '#000', 7)},
    points(base, at, {marker: mark('square', '#000', 5), tips: base.map(r => tip(r, `${flops(at(r))} FLOPs`))}),
    ...mine.map(r => points([r], at, {marker: mark(r.marker, r.colour, 7 + 5 * (budgets.indexOf(r.teacher_tokens) + 1) / budgets.length), tips: [tip(r, `${flops(at(r))} total FLOPs`)]})),
  ];
  return {traces, layout: layout(360, axis('total FLOPs, of student and teacher (log scale)', {type: 'log', tickvals: ticks, ticktext: ticks.map(v => v.toExponential(2).replace(/\.?0+e\+/, 'e')), tickangle: 0}), axis(axisTitle(measure)), {shapes: [zero(true)]})};
}

// What stands under a figure
function evidence(used) {
  const range = list => { const v = unique(list).sort((a, b) => a - b); return v.length > 1 ? `${v[0]}-${v.at(-1)}` : `${v[0]}`; };
  const parts = unique(used.map(r => r.validated)).map(v => {
    const group = used.filter(r => r.validated === v), seeds = range(group.map(r => r.n_seeds)), over = unique(group.map(r => r.over)).filter(Boolean).sort().join(' or ') || 'nothing';
    return `${v ? 'validated alpha' : 'declared alphas'}: ${seeds} ${v ? 'fresh ' : ''}seed${seeds === '1' ? '' : 's'} an arm, 95% intervals over ${over}${over.includes('seeds') ? '' : ' alone, with no variance between seeds in them'}`;
  });
  const documents = D.options.set.filter(s => used.some(r => r.set === s)).map(s => `${s} ${range(used.filter(r => r.set === s).map(r => r.n_documents))}`);
  const text = parts.join('; ');
  return text[0].toUpperCase() + text.slice(1) + `. Documents or items: ${documents.join(', ')}.`;
}
const GLYPHS = {circle: '●○', square: '■□', 'triangle-up': '▲△', diamond: '◆◇', 'triangle-down': '▼▽', cross: '✚✚', x: '✖✖', pentagon: '⬟⬠', 'triangle-right': '▶▷', star: '★☆', '': '  '};
const STROKES = {solid: '', dash: '5 3', dot: '2 3', dashdot: '6 2 2 2', longdash: '9 3', longdashdot: '9 2 2 2'};
function keyItem({text, symbol, color, hollow, dash}) {
  const line = dash ? `<line x1="0" y1="8" x2="28" y2="8" stroke="${color}" stroke-width="${symbol ? 2 : 6}" stroke-dasharray="${STROKES[dash]}"/>` : '';
  return `<span><svg width="28" height="16" aria-hidden="true">${line}<text x="14" y="12.5" text-anchor="middle" font-size="13" fill="${color}">${GLYPHS[symbol][+hollow]}</text></svg>${esc(text.trim())}</span>`;
}

// Plotly's own hover text is cut off at a panel's edge
const tooltip = document.body.appendChild(document.createElement('div'));
tooltip.id = 'tip';
tooltip.hidden = true;
function hover(div) {
  div.on('plotly_unhover', () => { tooltip.hidden = true; });
  div.on('plotly_hover', ({points: [p], event}) => {
    const found = Array.isArray(p.pointNumber) ? p.data.tips?.[p.pointNumber[0]][p.pointNumber[1]] : p.data.tips?.[p.pointNumber];
    if (!found) return;
    tooltip.innerHTML = found;
    tooltip.hidden = false;
    const at = div.getBoundingClientRect(), x = event?.clientX ?? at.left + at.width / 2, y = event?.clientY ?? at.top + at.height / 2;
    const left = x + 14 + tooltip.offsetWidth < document.documentElement.clientWidth ? x + 14 : x - 14 - tooltip.offsetWidth;
    tooltip.style.left = `${Math.max(4, left)}px`;
    tooltip.style.top = `${Math.max(4, Math.min(y + 14, innerHeight - tooltip.offsetHeight - 4))}px`;
  });
}

// Drawing: the frame and its numbers at once, the plots one after another, so that the page stays alive
function drawFigures() {
  const mine = ++drawing, host = document.getElementById('plots'), jobs = [];
  host.querySelectorAll('.js-plotly-plot').forEach(div => Plotly.purge(div));
  host.textContent = '';
  tooltip.hidden = true;
  const settings = state.student ? [state.student] : D.options.student;
  for (const [name, words] of Object.entries(D.figures)) {
    const section = host.appendChild(document.createElement('article'));
    section.id = `figure-${name}`;
    section.innerHTML = `<h3>${esc(words.title)}</h3>`;
    let n = 0, sum = 0;
    for (const setting of settings.length ? settings : ['']) {
      const figure = FIGURES[name](forFigures(setting));
      n += figure.used.length;
      sum += figure.used.reduce((total, r) => total + r.estimate, 0);
      const part = section.appendChild(document.createElement('div'));
      const heading = settings.length > 1 ? `<p><b>student ${esc(setting)}</b></p>` : '';
      if (!figure.used.length) {
        const why = Object.keys(state).length ? ' With these filters nothing is left to draw.' : '';
        part.innerHTML = `${heading}<div class="nothing">Not drawn: ${esc(words.needs)}.${why}</div>`;
        continue;
      }
      const lines = [words.how, ...words.alpha.filter((_, validated) => figure.used.some(r => r.arm === 'distilled' && r.validated === !!validated)).reverse(), evidence(figure.used), ...(words.contrasts[setting] || [])];
      const note = words.note ? `<p class="note">Note: ${esc(words.note)}</p>` : '';
      part.innerHTML = `${heading}<div class="key">${figure.keys.map(keyItem).join('')}</div><div class="panels"></div><div class="caption">${lines.map(l => `<p>${esc(l)}</p>`).join('')}${note}</div>`;
      for (const panel of figure.panels) {
        const box = part.querySelector('.panels').appendChild(document.createElement('div'));
        box.className = 'panel';
        if (panel.narrow || panel.wide) box.style.flexBasis = panel.wide || '270px';
        box.innerHTML = `<h4>${esc(panel.title)}</h4>`;
        const div = box.appendChild(document.createElement('div'));
        if (panel.empty) { div.className = 'nothing'; div.textContent = 'not scored, or filtered out'; continue; }
        div.className = 'plot';
        div.style.height = `${panel.layout.height}px`;
        div.setAttribute('role', 'img');
        div.setAttribute('aria-label', `${words.title}, ${panel.title}; its numbers are in the table below`);
        jobs.push(() => Plotly.newPlot(div, panel.traces, panel.layout, {responsive: true, displaylogo: false, displayModeBar: 'hover', modeBarButtons: [['zoom2d', 'pan2d', 'resetScale2d', 'toImage']]}).then(() => hover(div)));
      }
    }
    section.dataset.points = n;
    section.dataset.sum = sum;
  }
  const next = () => { if (mine === drawing && jobs.length) { jobs.shift()(); setTimeout(next, 0); } else if (mine === drawing) document.body.dataset.drawn = host.querySelectorAll('.js-plotly-plot').length; };
  next();
}

// The table
const FIRST = ['student', 'student_tokens', 'teacher', 'teacher_tokens', 'budget', 'arm', 'alpha', 'validated', 'scenario', 'set', 'measure', 'estimate', 'low', 'high', 'p', 'n_seeds', 'n_documents', 'over', 'baseline', 'value'];
const COLUMNS = [...FIRST, ...D.columns.filter(c => !FIRST.includes(c))].filter(c => D.columns.includes(c));
const LONG = new Set(['cells', 'seeds']), MOST = 3000;
let shown = [], all = false;
function cell(r, name) {
  const v = r[name];
  if (v === null || v === undefined) return '<td></td>';
  if (typeof v === 'number') return `<td class="n">${['estimate', 'low', 'high'].includes(name) ? signed(v) : Number.isInteger(v) && Math.abs(v) < 1e9 ? v : !finite(v) ? '∞' : +v.toPrecision(4)}</td>`;
  return LONG.has(name) ? `<td class="long" title="${esc(v)}">${esc(v)}</td>` : `<td>${esc(v)}</td>`;
}
function drawTable() {
  const [by, way] = sorting;
  shown = rows.filter(passes);
  const last = v => v === null || v === undefined || v === '';  // what is not there comes last, whichever way
  if (by) shown.sort((a, b) => { const x = a[by], y = b[by]; return last(x) || last(y) ? last(x) - last(y) || a.id - b.id : way * (x < y ? -1 : x > y ? 1 : 0) || a.id - b.id; });
  const part = all ? shown : shown.slice(0, MOST);
  document.querySelector('#effects thead').innerHTML = `<tr>${COLUMNS.map(c => `<th scope="col" aria-sort="${c === by ? (way > 0 ? 'ascending' : 'descending') : 'none'}"><button type="button" data-sort="${c}">${c}${c === by ? (way > 0 ? ' ▲' : ' ▼') : ''}</button></th>`).join('')}</tr>`;
  document.querySelector('#effects tbody').innerHTML = part.map(r => `<tr data-id="${r.id}">${COLUMNS.map(c => cell(r, c)).join('')}</tr>`).join('');
  document.getElementById('count').textContent = `${shown.length} of ${rows.length} rows`;
  const more = document.getElementById('more');
  more.hidden = part.length === shown.length;
  more.textContent = `Show all ${shown.length} rows (now: the first ${part.length})`;
  document.getElementById('csv-shown').href = csv(shown);
}
function csv(list) {
  const field = v => v === null || v === undefined ? '' : v === Infinity ? 'inf' : v === -Infinity ? '-inf' : v === true ? 'True' : v === false ? 'False' : /[",\n]/.test(v) ? `"${String(v).replaceAll('"', '""')}"` : String(v);
  return 'data:text/csv;charset=utf-8,' + encodeURIComponent([D.columns.join(','), ...list.map(r => D.columns.map(c => field(r[c])).join(','))].join('\n') + '\n');
}

function refresh() {
  readHash();
  for (const select of document.querySelectorAll('#filters select')) { select.value = state[select.name] || ''; select.classList.toggle('on', !!state[select.name]); }
  drawTable();
  drawFigures();
}
document.getElementById('filters').innerHTML = Object.entries(FILTERS).map(([name, [words]]) =>
  `<label>${words}<select name="${name}"><option value="">all</option>${D.options[name].map(v => `<option value="${esc(v)}">${esc(v)}</option>`).join('')}</select></label>`).join('');
document.getElementById('filters').addEventListener('change', e => { if (e.target.value) state[e.target.name] = e.target.value; else delete state[e.target.name]; writeHash(); });
document.getElementById('filters').addEventListener('submit', e => e.preventDefault());
document.getElementById('clear').addEventListener('click', () => { state = {}; writeHash(); });
document.getElementById('more').addEventListener('click', () => { all = true; drawTable(); });
document.getElementById('effects').addEventListener('click', e => {
  const by = e.target.dataset && e.target.dataset.sort;
  if (by) { sorting = [by, sorting[0] === by ? -sorting[1] : 1]; drawTable(); }
});
document.querySelectorAll('[data-goto]').forEach(a => a.addEventListener('click', e => { e.preventDefault(); document.getElementById(a.dataset.goto).scrollIntoView(); }));
document.getElementById('csv').href = csv(rows);
addEventListener('hashchange', refresh);
refresh();
