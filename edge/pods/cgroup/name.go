package cgroup

import (
	"fmt"
	"path"
	"strings"

	"k8s.io/apimachinery/pkg/types"

	"github.com/fairlead-io/fairlead/edge/pods/spec"
)

const (
	podPrefix = "pod"
	slice     = ".slice"
)

// name is a cgroup's path without the driver's spelling, such as
// kubepods, burstable, pod1234-abcd.
type name []string

func (n name) child(c string) name { return append(n[:len(n):len(n)], c) }

// path is the folder below a hierarchy's mount point. Systemd nests by dashes, so
// that those of a part become underscores:
// /kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1234_abcd.slice.
func (n name) path(driver string) string {
	return spec.CgroupPath(&spec.Node{CgroupDriver: driver}, n...)
}

// parseName reads the root, which is written as with cgroupfs whatever the driver.
func parseName(s string) (name, error) {
	var n name
	for part := range strings.SplitSeq(strings.Trim(s, "/"), "/") {
		if part == "" {
			continue
		}
		if part == "." || part == ".." || strings.Contains(part, "_") || strings.HasSuffix(part, slice) {
			return nil, fmt.Errorf("cgroup root %q: want a path such as /fairlead, without underscores or %s", s, slice)
		}
		n = append(n, part)
	}
	return n, nil
}

// checkUID keeps what is not one part of a path out of it.
func checkUID(uid types.UID) error {
	if uid == "" || strings.ContainsAny(string(uid), "/_\x00\n") || strings.Contains(string(uid), "..") {
		return fmt.Errorf("pod UID %q has no cgroup: want letters, digits and dashes", uid)
	}
	return nil
}

// podOf reads the UID from a folder's name; false if it is not a pod's.
func podOf(folder string, parent name, driver string) (types.UID, bool) {
	if driver == spec.Systemd {
		unit, ok := strings.CutSuffix(folder, slice)
		if !ok {
			return "", false
		}
		prefix := strings.TrimSuffix(path.Base(parent.path(spec.Systemd)), slice) + "-"
		if unit, ok = strings.CutPrefix(unit, prefix); !ok {
			return "", false
		}
		folder = strings.ReplaceAll(unit, "_", "-")
	}
	uid, ok := strings.CutPrefix(folder, podPrefix)
	return types.UID(uid), ok && checkUID(types.UID(uid)) == nil
}
