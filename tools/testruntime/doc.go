// Package testruntime runs a real containerd (Debian's packages containerd,
// runc, containernetworking-plugins and busybox-static) for tests, benchmarks
// and the demo, apart from whatever else runs on the machine: root, state,
// socket, network and images are its own, so several run side by side.
//
//	rt := testruntime.Start(t)           // rt.Socket: unix:///tmp/flr…/containerd.sock
//	rt.Kill(); err := rt.Restart()       // containers live on
//	rt.KillContainers()                  // containerd lives on
//	rt.PowerCut(); err := rt.Restart()   // a reboot
//
// The images fairlead.test/pause:1 and fairlead.test/busybox:1 are present;
// [Image] makes others. There is no registry.
//
// What a runtime leaves on the machine is removed by a process of its own
// (cleanup.sh), which also sees a test die that was killed. Containers belong
// below [Runtime.Cgroup], else their cgroups outlive a PowerCut.
package testruntime
