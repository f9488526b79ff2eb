// transformers.js: node transformers_js.mjs MODULES ARTIFACT INPUTS.json OUTPUT.json
import fs from "node:fs";
import path from "node:path";

const [modules, artifact, inputs, output] = process.argv.slice(2);
const entry = path.join(modules, "@huggingface/transformers/dist/transformers.node.mjs");
const { pipeline, env } = await import(entry);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(artifact) + "/";
const { texts, prompt } = JSON.parse(fs.readFileSync(inputs));
const extractor = await pipeline("feature-extraction", path.basename(artifact));
const options = { pooling: "last_token", normalize: true };
const found = await extractor(texts.map((text) => prompt + text), options);
fs.writeFileSync(output, JSON.stringify(found.tolist()));
