// Package jsonschema carries the JSON Schemas (draft 2020-12) of the payloads,
// for whoever speaks to the bus from another language. They say what a reader
// may rely on; fields they do not name are allowed and to be ignored, as newer
// writers may send them.
//
//	b, err := jsonschema.FS.ReadFile("reading.schema.json")
package jsonschema

import "embed"

// FS holds <payload>.schema.json for every payload.
//
//go:embed *.schema.json
var FS embed.FS
