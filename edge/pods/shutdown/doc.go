// Package shutdown ends pods in order before the machine goes down. It holds an
// inhibitor lock of systemd's logind, which lets go once the pods have ended: those
// of the lowest priority first, each group with a period of its own.
//
//	m := shutdown.New(shutdown.Config{
//		Periods: shutdown.Periods(30*time.Second, 10*time.Second), Pods: active, Kill: kill,
//	})
//	go m.Run(ctx)
//
// Where there is no logind, Terminate does the same when somebody else knows that
// the machine goes down.
package shutdown
