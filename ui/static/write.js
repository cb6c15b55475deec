// The Write tab as a notebook: who wrote what, undo and redo, branches, the probability of each
// word. All of it stays in the browser (localStorage); the server only continues texts and measures
// them. ui/write.py connects these functions to Gradio's events.
page.write = (() => {
    const KEY = 'gpt2-from-scratch/write';  // in localStorage
    const MAX_BRANCHES = 40;
    const MAX_UNDO = 200;
    const TYPING_MS = 800;   // letters typed within this time are undone together
    const SAVE_MS = 200;     // store the notebook after this pause,
    const MEASURE_MS = 400;  // and measure the text after this one
    const {element, count} = page;
    const find = id => document.getElementById(id);

    // The text in the box. A position is an index into JavaScript's string.
    const doc = {
        text: '',
        made: [],    // [start, end] of each part that the model wrote, in order
        from: null,  // where the last writing began; "Try again" goes back to it
    };
    let run = null;      // the writing in progress: {prompt, end, seen, settings, versions}
    let last = null;     // the settings of the last writing, for the link and the download
    let branches = [];   // the newest first: {id, name, text, made, from, note, settings}
    let tokens = [];     // of the text, when it is coloured: {start, end, p, colour, others}
    let past = [], future = [], typedAt = 0;  // for undo and redo
    let box, mirror, server;                  // two elements, and the server's functions
    const parts = {};                         // elements below the box, by class

    // ---------------------------------------------------------------------------------------------
    // The text and who wrote it

    // Replaces `removed` characters at a position. What the model wrote stays marked as such.
    function splice(at, removed, inserted, byModel = false) {
        const end = at + removed, shift = inserted.length - removed;
        doc.text = doc.text.slice(0, at) + inserted + doc.text.slice(end);
        // cut each of the model's parts at the edit, and move what lies behind it
        const cut = doc.made.flatMap(([a, b]) =>
            [[a, Math.min(b, at)], [Math.max(a, end) + shift, b + shift]]);
        if (byModel) cut.push([at, at + inserted.length]);
        doc.made = [];
        cut.sort((x, y) => x[0] - y[0]);
        for (const [a, b] of cut.filter(([a, b]) => a < b)) {
            const before = doc.made.at(-1);
            if (before && before[1] === a) before[1] = b; else doc.made.push([a, b]);
        }
        if (doc.from !== null && !byModel && doc.from >= end) doc.from += shift;
        else if (doc.from > at && doc.from < end) doc.from = at;
        // what is typed at the end while the model writes stays behind its text
        if (run && !byModel && run.end > at) run.end = Math.max(run.end + shift, at);
    }

    // Takes over what the visitor, or another tab, has put into the box.
    function typed() {
        const before = doc.text, now = box.value;
        if (before === now) return;
        const shorter = Math.min(before.length, now.length);
        let head = 0, tail = 0;
        while (head < shorter && before[head] === now[head]) head++;
        while (tail < shorter - head && before.at(-1 - tail) === now.at(-1 - tail)) tail++;
        if (Date.now() - typedAt > TYPING_MS) remember();
        typedAt = Date.now();
        splice(head, before.length - head - tail, now.slice(head, now.length - tail));
        changed();
    }

    // Writes the text into the box, where the caret and the place that one reads stay.
    function show() {
        const {selectionStart, selectionEnd, scrollTop, scrollHeight, clientHeight} = box;
        const added = doc.text.length - box.value.length;
        const atEnd = scrollHeight - scrollTop - clientHeight < 80;
        if (added || box.value !== doc.text) {
            const focused = document.activeElement === box;
            const moved = position => {
                if (!focused) return doc.text.length;
                return run && position >= run.end - added ? position + added : position;
            };
            box.value = doc.text;
            box.setSelectionRange(moved(selectionStart), moved(selectionEnd));
            box.dispatchEvent(new Event('input', {bubbles: true}));  // Gradio reads the value
        }
        changed();
        box.scrollTop = atEnd ? box.scrollHeight : scrollTop;
    }

    function changed() {
        draw();
        save();
        if (!run) measureSoon();
    }

    // ---------------------------------------------------------------------------------------------
    // Drawing: a textarea has one colour, so its text is invisible and a copy behind it has colours

    function draw() {
        const cuts = new Set([0, doc.text.length, ...doc.made.flat()]);
        for (const token of tokens) cuts.add(token.start).add(token.end);
        const places = [...cuts].sort((a, b) => a - b);
        let made = 0, token = 0;
        const spans = places.slice(0, -1).map((start, i) => {
            while (made < doc.made.length && doc.made[made][1] <= start) made++;
            while (token < tokens.length && tokens[token].end <= start) token++;
            const names = [];
            if (made < doc.made.length && doc.made[made][0] <= start) names.push('made');
            const here = tokens[token];
            if (here && here.start <= start && here.p !== null) names.push(`p${here.colour}`);
            const text = doc.text.slice(start, places[i + 1]);
            const span = element('span', {className: names.join(' ')}, text);
            span.dataset.start = start;
            return span;
        });
        mirror.replaceChildren(...spans, '\n');
        mirror.scrollTop = box.scrollTop;
        find('undo').disabled = !past.length;
        find('redo').disabled = !future.length;
        find('again').disabled = doc.from === null;
        find('actions').toggleAttribute('data-writing', run !== null);
    }

    function drawGauge(used, size) {
        const number = value => value.toLocaleString('en');
        parts.gauge.replaceChildren(page.gauge(used, size), used < size
            ? `${count(used, 'token')} of ${number(size)} used, ${number(size - used)} left`
            : `The model reads only the last ${count(size, 'token')}.`);
    }

    // ---------------------------------------------------------------------------------------------
    // Undo, and what stays after a reload

    const snapshot = () => structuredClone(doc);

    // Keeps the text as it is now, for undo.
    function remember() {
        past.push(snapshot());
        if (past.length > MAX_UNDO) past.shift();
        future = [];
        typedAt = 0;
    }

    // Exchanges the text for the last one on a stack.
    function step(from, to) {
        if (run) stop();
        if (!from.length) return;
        to.push(snapshot());
        replace(from.pop());
    }

    function replace(state) {
        Object.assign(doc, {text: state.text, made: state.made.map(part => [...part]),
                            from: state.from});
        tokens = [];
        typedAt = 0;
        show();
    }

    const undo = () => step(past, future);
    const redo = () => step(future, past);

    let saving;
    const save = () => { clearTimeout(saving); saving = setTimeout(store, SAVE_MS); };

    // Stores the notebook; the oldest branches go if the browser has no more space.
    function store() {
        for (let kept = branches.length; kept >= 0; kept = kept ? Math.floor(kept / 2) : -1) {
            try {
                const notebook = {...snapshot(), branches: branches.slice(0, kept)};
                localStorage.setItem(KEY, JSON.stringify(notebook));
                return;
            } catch { /* too large, or the browser stores nothing */ }
        }
    }

    function restore() {
        try {
            const saved = JSON.parse(localStorage.getItem(KEY));
            if (!saved) return;
            branches = saved.branches ?? [];
            replace(saved);
        } catch { /* nothing readable was stored */ }
    }

    // ---------------------------------------------------------------------------------------------
    // Writing

    // The prompt and the seed of the next writing. With `again` the last one is replaced.
    function start(seed, newSeed, again = false) {
        if (run) return [run.prompt, seed];  // Gradio ignores it: one text at a time
        typed();
        remember();
        if (again && doc.from !== null) splice(doc.from, doc.text.length - doc.from, '');
        doc.from = doc.text.length;
        tokens = [];
        run = {prompt: doc.text, end: doc.text.length, seen: 0, versions: []};
        show();
        box.scrollTop = box.scrollHeight;
        return [run.prompt, newSeed || again ? Math.floor(Math.random() * 2 ** 32) : seed];
    }

    // Takes over what the model has written so far, from ui/write.py. Returns the link.
    function receive(message) {
        if (!run || !message) return run ? '' : end();
        const {versions, settings, context} = message;
        const done = versions.length && versions.every(version => version.reason);
        Object.assign(run, {versions, settings});
        if (context.size) drawGauge(context.used, context.size);
        if (versions.length === 1 || done) insert(versions[0]?.text ?? '');
        else drawVersions();
        return done ? end() : '';
    }

    // Adds the new part of the model's text.
    function insert(text) {
        const added = text.slice(run.seen);
        if (!added) return;
        const at = run.end;
        run.seen = text.length;
        run.end += added.length;
        splice(at, 0, added, true);
        show();
    }

    // Ends the writing. Returns the link that writes the same text again: the page's address with
    // the settings after the #.
    function end() {
        if (run) keep();
        if (!last) return '';
        const stop = last.stop.map(text => text.replaceAll('\n', '\\n')).join('\n');
        const request = encodeURIComponent(JSON.stringify({...last, stop}));
        return `${location.href.split('#')[0]}#${request}`;
    }

    // Keeps every version that was written as a branch.
    function keep() {
        const {prompt, versions, settings} = run;
        const written = versions.filter(version => version.text);
        last = settings?.model ? settings : last;
        run = null;
        written.forEach((version, i) => {
            const text = prompt + version.text;
            const state = i ? {text, made: [[prompt.length, text.length]]} : snapshot();
            branches.splice(i, 0, {
                ...state, from: prompt.length, settings, note: describe(version, settings),
                id: Date.now() + i, name: '', start: version.text.slice(0, 160)});
        });
        branches.length = Math.min(branches.length, MAX_BRANCHES);
        if (!written.length) past.pop();  // nothing to undo
        parts.versions.replaceChildren();
        if (written.length > 1) parts.branches.open = true;
        drawBranches();
        show();
    }

    const stop = () => find('stop').click();  // which calls `end`

    function describe(version, settings) {
        const note = `${settings.model} · ${count(version.tokens, 'token')}`;
        if (version.mean_logprob === null) return note;
        const percent = (100 * Math.exp(version.mean_logprob)).toFixed(0);
        return `${note} · a token had a probability of ${percent}% on average`;
    }

    // Several versions are shown side by side while they are written.
    function drawVersions() {
        parts.versions.replaceChildren(...run.versions.map((version, i) =>
            element('div', {className: 'card'}, element('b', {}, `Version ${i + 1}`),
                    element('p', {className: 'made'}, version.text))));
    }

    // ---------------------------------------------------------------------------------------------
    // Branches: every text that the model wrote

    function drawBranches() {
        parts.branches.hidden = !branches.length;
        parts.branches.querySelector('summary').textContent =
            `Branches: ${count(branches.length, 'text')} that the model wrote`;
        parts.branches.querySelector('div').replaceChildren(...branches.map((branch, i) => {
            const number = branches.length - i;
            const name = element('input', {
                value: branch.name, placeholder: `Branch ${number}`, maxLength: 60,
                ariaLabel: `Name of branch ${number}`,
                onchange: () => { branch.name = name.value; save(); }});
            const button = (label, onclick) =>
                element('button', {ariaLabel: `${label} branch ${number}`, onclick}, label);
            const comparison = element('div', {className: 'comparison'});
            return element('div', {className: 'card'}, name,
                element('p', {}, element('span', {className: 'made'}, branch.start), ' …'),
                element('small', {}, branch.note),
                element('div', {},
                    button('Open', () => { remember(); last = branch.settings; replace(branch); }),
                    button('Compare', () => compare(branch, comparison)),
                    button('Delete', () => { branches.splice(i, 1); drawBranches(); save(); })),
                comparison);
        }));
    }

    // Shows a branch beside the text in the box, with the place where they part.
    function compare(branch, comparison) {
        if (comparison.childElementCount) return comparison.replaceChildren();
        let same = 0;
        while (same < branch.text.length && branch.text[same] === doc.text[same]) same++;
        const column = (title, text) => element('div', {}, element('b', {}, title),
            element('p', {}, text.slice(0, same), element('mark', {}, text.slice(same))));
        if (branch.text === doc.text) return comparison.append('The text in the box is the same.');
        comparison.replaceChildren(column('This branch', branch.text),
                                   column('In the box now', doc.text));
    }

    // ---------------------------------------------------------------------------------------------
    // Probabilities

    let timer;
    const measureSoon = () => { clearTimeout(timer); timer = setTimeout(measure, MEASURE_MS); };

    // Asks the server how many tokens the text has, and with colours for their probabilities.
    async function measure() {
        const text = doc.text, colours = document.querySelector('#colours input').checked;
        parts.legend.hidden = !colours;
        if (run) return;
        const request = {text, colours, model: document.querySelector('#model input').value,
                         dtype: document.querySelector('#dtype input')?.value ?? null};
        const result = await server.measure(request).catch(() => null);
        if (!result || text !== doc.text || run) return;
        drawGauge(result.used, result.size);
        // the tokens are the end of the text; give each its place
        tokens = [];
        const length = result.tokens.reduce((sum, token) => sum + token.text.length, 0);
        let start = text.length - length;
        for (const {text: own, logprob, colour, top} of start < 0 ? [] : result.tokens) {
            const p = logprob === null ? null : Math.exp(logprob);
            const others = top.map(([word, logprob]) => [word, Math.exp(logprob)]);
            tokens.push({start, end: start + own.length, p, colour, others});
            start += own.length;
        }
        draw();
    }

    // Lists what else the word at the caret could have been; a click continues from there.
    function ask() {
        const at = box.selectionStart;
        const token = tokens.find(token => token.start <= at && at < token.end);
        if (!token || token.p === null || box.selectionEnd !== at) return;
        const percent = p => p < 0.001 ? 'under 0.1%' : `${(100 * p).toFixed(p < 0.1 ? 1 : 0)}%`;
        const word = doc.text.slice(token.start, token.end);
        const visible = text =>
            (text.trim() ? text : text.replaceAll(' ', '␣')).replaceAll('\n', '⏎');
        const choices = token.others.map(([text, p]) =>
            element('button', {onclick: () => take(token.start, text)},
                    element('span', {}, visible(text)), element('small', {}, percent(p))));
        parts.others.replaceChildren(
            element('p', {}, element('b', {}, visible(word)),
                    ` had a probability of ${percent(token.p)}. `,
                    'Choose another word and the model continues from there:'),
            ...choices);
        // open it below the word
        const span = mirror.querySelector(`[data-start="${token.start}"]`).getBoundingClientRect();
        parts.others.style.left = `${Math.max(8, Math.min(span.left, innerWidth - 290))}px`;
        parts.others.style.top = `${Math.min(span.bottom + 4, innerHeight - 260)}px`;
        parts.others.showPopover();
        choices[0].focus();
    }

    function take(at, text) {
        parts.others.hidePopover();
        remember();
        splice(at, doc.text.length - at, '');
        splice(at, 0, text, true);
        begin(doc.text);
    }

    // ---------------------------------------------------------------------------------------------
    // The page

    // Puts a text into the box and lets the model continue it.
    function begin(text) {
        if (run) stop();
        if (text !== doc.text) {
            remember();
            splice(0, doc.text.length, text);
        }
        show();
        find('generate').click();
    }

    // Connects the box and what stands below it (views.html), once all of the page is there.
    function open(place, functions) {
        server = functions;
        box = document.querySelector('#text textarea');
        const needed = ['undo', 'redo', 'again', 'actions', 'stop', 'colours', 'model'];
        if (!box || !needed.every(find)) return requestAnimationFrame(() => open(place, functions));
        mirror = element('div', {className: 'mirror', ariaHidden: 'true'});
        box.before(mirror);
        box.classList.add('mirrored');
        for (const name of ['gauge', 'legend', 'versions', 'branches', 'others']) {
            parts[name] = place.querySelector(`.${name}`);
        }

        window.addEventListener('pagehide', store);
        find('stop').addEventListener('click', end);  // at once; Gradio's own event comes later
        parts.branches.querySelector(':scope > button').addEventListener('click', () => {
            branches = [];
            drawBranches();
            save();
        });
        box.addEventListener('input', typed);
        box.addEventListener('scroll', () => { mirror.scrollTop = box.scrollTop; });
        box.addEventListener('click', ask);
        box.addEventListener('keydown', event => {
            const key = event.key.toLowerCase(), command = event.ctrlKey || event.metaKey;
            const action = command && key === 'z' ? (event.shiftKey ? redo : undo)
                : command && key === 'y' ? redo
                : event.altKey && key === 'arrowdown' ? ask : null;
            if (!action) return;
            event.preventDefault();
            action();
        });
        doc.text = box.value;
        restore();
        drawBranches();
        changed();
    }

    return {
        open, typed, start, receive, end, undo, redo, begin, measure,
        again: (seed, newSeed) => start(seed, newSeed, true),

        clear() {
            if (run) stop();
            remember();
            replace({text: '', made: [], from: null});
        },

        // Starts the text of a link; the text of the last visit can be had by undo.
        follow(prompt) {
            if (run) stop();
            remember();
            run = {prompt, end: prompt.length, seen: 0, versions: []};
            replace({text: prompt, made: [], from: prompt.length});
        },

        // Saves the text as a file: "txt", or "json" with the settings that made it.
        download(kind) {
            const record = {...last, text: doc.text};
            const content = kind === 'json' ? JSON.stringify(record, null, 2) : doc.text;
            page.download(`text.${kind}`, content);
        },
    };
})();
