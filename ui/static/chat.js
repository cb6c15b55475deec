// Chat: draws the conversations, edits them, and keeps them in this browser (localStorage).
//
// The open conversation is `talk`: {id, title, turns: [{role, content}], ask, asked, error,
// left_out, used, context, figures}. Its "ask" says what the server is to do now: "reply",
// "continue", or null; "asked" says when it was asked, so that late news of a stopped reply is
// ignored. The server streams it back with the reply. Texts are text nodes, never HTML.
(() => {
  const {element} = page;
  const KEY = "chats";
  const MAX_CHATS = 200;
  const NAMES = {user: "You", assistant: "Model"};
  let talk = empty();
  let chats = [];  // the newest first
  let editing = null;  // index of the turn that is being edited

  function empty() {
    return {id: Date.now(), title: "", turns: [], ask: null};
  }

  function button(label, onclick, hint = label) {
    return element("button", {type: "button", onclick, title: hint, ariaLabel: hint}, label);
  }

  // ---------------------------------------------------------------------------------------------
  // Keeping the conversations

  function titleOf(chat) {
    return chat.title || chat.turns[0]?.content.trim().slice(0, 40) || "New chat";
  }

  function write() {
    try {
      localStorage.setItem(KEY, JSON.stringify(chats));
    } catch {
      talk.error = "This browser has no room to keep the conversation: delete some, or save them.";
    }
  }

  // Keeps the open conversation, first in the list.
  function keep() {
    if (!talk.turns.length) return;
    chats = [talk, ...chats.filter(chat => chat.id != talk.id)].slice(0, MAX_CHATS);
    write();
  }

  // Shows a conversation.
  function show(next) {
    talk = {...next, ask: null, error: null};
    editing = null;
    draw();
  }

  // Has the server reply to the last turn, or continue it.
  function ask(turns, what = "reply") {
    talk = {...talk, turns, ask: what, asked: Date.now(), error: null};
    editing = null;
    keep();
    document.querySelector("#chat-hand-over").click();
  }

  // ---------------------------------------------------------------------------------------------
  // The list of conversations

  function drawChats() {
    const items = chats.map(chat => {
      const open = button(titleOf(chat), () => show(chat));
      open.disabled = Boolean(talk.ask);
      if (chat.id == talk.id) open.setAttribute("aria-current", "true");
      return element("li", {}, open);
    });
    const tools = element("p", {className: "tools"}, button("New chat", () => show(empty())));
    if (talk.turns.length) {
      tools.append(button("Rename", rename), button("Delete", remove),
                   button("Save as text", () => save("txt")),
                   button("Save as JSON", () => save("json")));
    }
    for (const tool of tools.children) tool.disabled = Boolean(talk.ask);
    const note = element("p", {className: "note"}, items.length
      ? "Kept in this browser only."
      : "Your conversations will be listed here. They are kept in this browser only.");
    document.querySelector("#chats").replaceChildren(tools, element("ul", {}, ...items), note);
  }

  function rename() {
    const title = prompt("Name of this conversation:", titleOf(talk));
    if (title?.trim()) {
      talk = {...talk, title: title.trim().slice(0, 80)};
      keep();
      drawChats();
    }
  }

  function remove() {
    if (!confirm(`Delete “${titleOf(talk)}”?`)) return;
    chats = chats.filter(chat => chat.id != talk.id);
    write();
    show(chats[0] || empty());
  }

  // Saves the open conversation as a file.
  function save(kind) {
    const content = kind == "json"
      ? JSON.stringify({title: titleOf(talk), messages: talk.turns}, null, 2)
      : talk.turns.map(turn => `${NAMES[turn.role]}:\n${turn.content}\n`).join("\n");
    page.download(`${titleOf(talk)}.${kind}`, content);
  }

  // ---------------------------------------------------------------------------------------------
  // The open conversation

  function drawTurn(turn, i) {
    if (i === editing) return drawEditor(turn, i);
    const last = i == talk.turns.length - 1;
    const text = element("div", {className: "text"}, turn.content || "…");
    const tools = element("div", {className: "tools"});
    if (!talk.ask) {
      tools.append(button("Copy", () => navigator.clipboard.writeText(turn.content)));
      if (turn.role == "user") {
        tools.append(button("Edit", () => { editing = i; draw(); }));
        if (last) tools.append(button("Ask again", () => ask(talk.turns)));
      } else if (last) {
        tools.append(button("Retry", () => ask(talk.turns.slice(0, i)), "Write another reply"),
                     button("Continue", () => ask(talk.turns, "continue"), "Continue this reply"));
      }
    }
    const box = element("article", {
      className: `turn ${turn.role}`, ariaLabel: NAMES[turn.role]}, text, tools);
    if (i < talk.left_out) box.classList.add("left-out");
    return box;
  }

  // A box to edit what the user said. Later turns are removed when it is sent.
  function drawEditor(turn, i) {
    const area = element("textarea", {
      value: turn.content, rows: 3, ariaLabel: "Edit your message"});
    const send = () => {
      if (area.value.trim()) ask([...talk.turns.slice(0, i), {...turn, content: area.value}]);
    };
    const cancel = () => { editing = null; draw(); };
    area.onkeydown = event => {
      if (event.key == "Escape") cancel();
      if (event.key == "Enter" && !event.shiftKey) { event.preventDefault(); send(); }
    };
    setTimeout(() => area.focus());
    return element("article", {className: "turn user editor"}, area,
      element("div", {className: "tools"}, button("Send", send), button("Cancel", cancel)));
  }

  function draw() {
    const box = document.querySelector("#turns");
    if (!box) return;
    const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
    const turns = talk.turns.map(drawTurn);

    // say where the model's reading begins, that it is about to reply, and what went wrong
    if (talk.left_out) {
      turns.splice(talk.left_out, 0, element("p", {className: "note"},
        "The model no longer reads what is above: its context is full."));
    }
    if (talk.ask == "reply" && talk.turns.at(-1)?.role == "user") {
      turns.push(drawTurn({role: "assistant", content: ""}));
    }
    if (talk.error) turns.push(element("p", {className: "note error"}, talk.error));
    if (!turns.length) {
      turns.push(element("p", {className: "note"}, "Say something below. You can edit what you "
        + "said, and have the model retry or continue its reply."));
    }
    box.replaceChildren(...turns);
    box.setAttribute("aria-busy", Boolean(talk.ask));
    if (atEnd) box.scrollTop = box.scrollHeight;
    document.querySelector("#chat-stop").style.display = talk.ask ? "" : "none";
    drawGauge();
    drawChats();
  }

  // How much of the model's context the conversation takes, and what the server has to say.
  function drawGauge() {
    const status = document.querySelector("#chat-status");
    const [figures, ...notices] = (talk.figures || "").split("  ");
    status.title = figures;
    if (talk.ask && !figures.includes(" · ")) {  // it waits
      status.replaceChildren(figures);
    } else if (talk.context) {
      status.replaceChildren(page.gauge(talk.used, talk.context), ` ${talk.used} of ${talk.context} tokens of the model's `
        + `context used. ${notices.join(" ")}`);
    } else {
      status.replaceChildren();
    }
  }

  // ---------------------------------------------------------------------------------------------
  // What ui/chat.py calls

  page.chat = {
    // The page has opened: shows the newest conversation.
    start() {
      try {
        chats = JSON.parse(localStorage.getItem(KEY)) || [];
      } catch {
        chats = [];
      }
      // Gradio builds a tab when it is first opened
      const waiting = setInterval(() => {
        if (!document.querySelector("#chats")) return;
        clearInterval(waiting);
        show(chats[0] || empty());
      }, 100);
    },

    // The user sends a message. An empty one, or one during a reply, stays in its box, and so
    // does what has been typed since.
    send(message) {
      if (talk.ask || !message.trim()) return;
      const box = document.querySelector("#say textarea");
      if (box.value.startsWith(message)) {
        box.value = box.value.slice(message.length);
        box.dispatchEvent(new Event("input", {bubbles: true}));
      }
      ask([...talk.turns, {role: "user", content: message}]);
    },

    handOver: () => talk,

    // The server has sent more of the reply.
    draw(value) {
      if (value?.asked == talk.asked && talk.ask) talk = value;
      draw();
    },

    // The reply has ended, or was stopped.
    end(value) {
      if (value?.asked != talk.asked) return;
      talk = {...talk, ask: null};
      keep();
      draw();
    },
  };
})();
