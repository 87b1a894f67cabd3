// Shows /openapi.json. Where the server has API keys it asks for one first; the key stays in this page.
"use strict";

async function start() {
  let key = null;
  let answer = await fetch("openapi.json");
  while (answer.status === 401) {
    key = window.prompt("API key");
    if (key === null) {
      document.getElementById("docs").textContent = "The API document needs an API key.";
      return;
    }
    answer = await fetch("openapi.json", { headers: { Authorization: `Bearer ${key}` } });
  }
  const spec = await answer.json();
  const ui = SwaggerUIBundle({
    spec,
    dom_id: "#docs",
    validatorUrl: null,
    onComplete: () => key !== null && ui.preauthorizeApiKey("key", key),
  });
}

start();
