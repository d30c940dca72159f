package pods_test

import (
	"fmt"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

func TestZZSpeed(t *testing.T) {
	s := newSite(t)
	for i := range 6 {
		p := pod(t, manifest(fmt.Sprintf("s%d", i), forever, "", ""))
		t0 := time.Now()
		s.apply(p)
		s.until(p, "running", running)
		t.Log("create->running", time.Since(t0))
	}
	var ps []*corev1.Pod
	t0 := time.Now()
	for i := range 20 {
		p := pod(t, manifest(fmt.Sprintf("m%02d", i), forever, "", ""))
		p.UID = p.UID[:20] + "x" + p.UID[21:]
		s.apply(p)
		ps = append(ps, p)
	}
	for _, p := range ps {
		s.until(p, "running", running)
	}
	t.Log("20 pods", time.Since(t0))
}
