"use strict";
// A page without a server: plays the walks that `mfwm play --export` recorded, through the same drawing as a live one.

(async () => {
  const recorded = JSON.parse(byId("recorded").textContent);
  const bytesOf = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const unpacked = async (text) => {
    const stream = new Blob([bytesOf(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
    const buffer = await new Response(stream).arrayBuffer(), view = new DataView(buffer), parts = [];
    for (let at = 0; at < buffer.byteLength;) {
      const length = view.getUint32(at, true);
      parts.push(buffer.slice(at + 4, at + 4 + length));
      at += 4 + length;
    }
    return parts;
  };
  const local = { player: true, random: true, viewers: 0, asking: 0, temperature: 0, start: 0, notice: "", paused: false };
  let walk = 0, next = 0;
  const walks = recorded.walks.map(() => null);

  function pressed() {
    const action = recorded.walks[walk].actions[next - 1];
    for (const button of document.querySelectorAll("#actions button")) {
      button.setAttribute("aria-pressed", String(+button.dataset.action === action));
    }
    if (Array.isArray(action)) {
      document.querySelectorAll("#actions input").forEach((input, i) => {
        input.value = action[i];
        input.nextElementSibling.textContent = action[i].toFixed(2);
      });
    }
  }

  function show() {
    moment(walks[walk][next]);
    next += 1;
    pressed();
  }

  async function begin(number) {
    walks[number] ??= await unpacked(recorded.walks[number].moments);
    [walk, next] = [number, 0];
    local.start = number;
    take({ kind: "state", ...local });
    disable();
    show();
  }

  // Nothing answers to keys of the game here.
  function disable() {
    for (const control of document.querySelectorAll("#actions button, #actions input")) control.disabled = true;
  }

  say = (message) => {
    if (message.kind === "reset") begin(message.start ?? Math.floor(Math.random() * walks.length));
    if (message.kind === "pause" || message.kind === "step") {
      local.paused = message.kind === "step" || message.on;
      take({ kind: "state", ...local });
      disable();
      if (message.kind === "step" && next < walks[walk].length) show();
    }
  };

  take({ kind: "world", ...recorded.world });
  starts(bytesOf(recorded.starts).buffer);
  for (const id of ["random", "record", "heat"]) byId(id).hidden = true;
  for (const id of ["latency", "compute"]) byId(id).parentElement.hidden = true;
  byId("role").textContent = "recorded";
  await begin(0);
  setInterval(() => {
    if (local.paused || !walks[walk]) return;
    if (next < walks[walk].length) show();
    else begin((walk + 1) % walks.length);
  }, 1000 / recorded.fps);
})();
