// Package layout holds the shape of the repository as tests: which package may
// import which, each rule with its reason, which top-level folders there are,
// and what no tracked file may contain. It has no code of its own.
//
//	go test ./tools/layout
package layout
