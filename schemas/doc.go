// Package schemas is the root of Fairlead's wire contract. It holds no code of
// its own: the packages below it define the topics (topic), who may use them
// (access), the payloads (payload), the device model and its value arithmetic
// (device) and the set digest behind repair (digest). The CustomResourceDefinitions
// live in crd/, the JSON Schemas in jsonschema/, the prose in README.md.
//
// Nothing here imports another part of Fairlead or Kubernetes.
package schemas
