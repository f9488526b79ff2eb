// onnxruntime-node and onnxruntime-web (wasm):
// node onnxruntime_js.mjs MODULES ARTIFACT INPUTS.json OUTPUT.json node|web
import fs from "node:fs";
import path from "node:path";

const [modules, artifact, inputs, output, kind] = process.argv.slice(2);
const entries = {
  node: "onnxruntime-node/dist/index.js",
  web: "onnxruntime-web/dist/ort.wasm.min.mjs",
};
const loaded = await import(path.join(modules, entries[kind]));
const ort = loaded.InferenceSession ? loaded : loaded.default;
const graph = path.join(artifact, "onnx", "model.onnx");
let session;
if (kind === "node") {
  session = await ort.InferenceSession.create(graph);
} else {
  ort.env.wasm.numThreads = 1;
  const name = fs.readdirSync(path.dirname(graph)).find((file) => file.endsWith("_data"));
  const data = new Uint8Array(fs.readFileSync(path.join(path.dirname(graph), name)));
  session = await ort.InferenceSession.create(new Uint8Array(fs.readFileSync(graph)), {
    externalData: [{ path: name, data }],
  });
}
const { ids } = JSON.parse(fs.readFileSync(inputs));
const name = session.outputNames.includes("score") ? "score" : "sentence_embedding";
const found = [];
for (const row of ids) {
  const tensor = (values) => new ort.Tensor("int64", BigInt64Array.from(values), [1, row.length]);
  const feeds = { input_ids: tensor(row.map(BigInt)), attention_mask: tensor(row.map(() => 1n)) };
  const result = Array.from((await session.run(feeds))[name].data);
  found.push(name === "score" ? result[0] : result);
}
fs.writeFileSync(output, JSON.stringify(found));
