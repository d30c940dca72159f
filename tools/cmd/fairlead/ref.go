package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/fairlead-io/fairlead/schemas/topic"
)

// ref names a device, or one of its properties.
type ref struct{ ns, device, property string }

func (r ref) String() string {
	s := r.ns + "/" + r.device
	if r.property != "" {
		s += "/" + r.property
	}
	return s
}

// refs gives what [ns/]device[/property] may mean, the likelier first: two
// levels are a device and its property, or a namespace and a device.
func (a *app) refs(arg string) ([]ref, error) {
	l := strings.Split(arg, "/")
	var out []ref
	switch len(l) {
	case 1:
		out = []ref{{a.namespace, l[0], ""}}
	case 2:
		out = []ref{{a.namespace, l[0], l[1]}, {l[0], l[1], ""}}
	case 3:
		out = []ref{{l[0], l[1], l[2]}}
	default:
		return nil, fmt.Errorf("%q: want [namespace/]device[/property]", arg)
	}
	var first error
	out = slices.DeleteFunc(out, func(r ref) bool {
		err := r.check()
		if first == nil {
			first = err
		}
		return err != nil
	})
	if len(out) == 0 {
		return nil, fmt.Errorf("%q: want [namespace/]device[/property]: %w", arg, first)
	}
	return out, nil
}

// propertyRef reads [ns/]device/property.
func (a *app) propertyRef(arg string) (ref, error) {
	rs, err := a.refs(arg)
	if err != nil {
		return ref{}, err
	}
	if rs[0].property == "" {
		return ref{}, fmt.Errorf("%q: want [namespace/]device/property", arg)
	}
	return rs[0], nil
}

func (r ref) check() error {
	if err := topic.CheckName("namespace", r.ns); err != nil {
		return err
	}
	if err := topic.CheckName("device", r.device); err != nil {
		return err
	}
	if r.property == "" {
		return nil
	}
	return topic.CheckProperty(r.property)
}

// names tells whether the reference names the property of the device.
func (r ref) names(ns, device, property string) bool {
	return r.ns == ns && r.device == device && (r.property == "" || r.property == property)
}

// choose gives the first meaning that exists, from a listing of what there is.
func choose(rs []ref, rows []row) (ref, bool) {
	for _, r := range rs {
		for _, w := range rows {
			if r.names(w.Namespace, w.Device, w.Property) {
				return r, true
			}
		}
	}
	return ref{}, false
}
