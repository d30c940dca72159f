// Package crd carries the CustomResourceDefinitions of DeviceModel and Device as
// they stand in this folder, so that a program can apply them without files
// beside it.
//
//	for _, f := range crd.All() {
//		apply(f.Name, f.YAML)
//	}
package crd

import (
	"embed"
	"io/fs"
)

//go:embed *.yaml
var files embed.FS

// File is one definition.
type File struct {
	Name string // the file's name, such as devices.yaml
	YAML []byte // one document
}

// All gives the definitions sorted by name. The caller owns the bytes.
func All() []File {
	entries, err := fs.ReadDir(files, ".")
	if err != nil {
		panic("crd: " + err.Error()) // embedded: cannot fail
	}
	out := make([]File, 0, len(entries))
	for _, e := range entries {
		b, err := files.ReadFile(e.Name())
		if err != nil {
			panic("crd: " + err.Error())
		}
		out = append(out, File{Name: e.Name(), YAML: b})
	}
	return out
}
