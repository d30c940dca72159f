// Package evict keeps the node alive when memory, disk or process IDs run out: it
// sets the pressure conditions, refuses pods, frees what is unused and evicts pods
// in the order of the stock kubelet, with its reasons and messages. Pods that
// exceed their own limits of local storage go too.
//
//	m := evict.New(evict.Config{
//		Thresholds: thresholds, // evict.Parse(evict.DefaultHard, nil, nil, nil)
//		Observe: evict.Host{…}.Observe, Pods: active, Usage: usage, Evict: kill, …
//	})
//	go m.Run(ctx)
//	if reason, message := m.Admit(pod); reason != "" { … refused … }
//
// It looks every 10 s, which costs a few reads of /proc and statfs, and at once
// when the kernel tells that memory is short. Folders are walked only for pods
// with limits of local storage, once a minute, and to rank pods by their disk use.
package evict
