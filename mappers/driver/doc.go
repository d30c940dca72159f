// Package driver is the driver kit: what every mapper does, whatever its
// protocol. A protocol implements [Driver] and [Session]; the kit takes devices
// and targets from the node's bus, polls, reports changes, writes targets and
// acknowledges them.
//
//	err := driver.Run(ctx, driver.Config{
//		Bus:  "mqtt://127.0.0.1:1883",
//		Node: "plant-7",
//		Name: "modbus",
//	}, modbus.New(nil))
//
// How it works, from the outside in:
//
//   - [Run] owns everything: the bus connection, the engine, the outbox, the
//     metrics endpoint. It joins all of them before it returns.
//   - The engine (engine.go) is one goroutine that holds what the bus says is
//     wanted and diffs it with the workers that run. A device whose resolved
//     payload did not change in a field that matters is never touched.
//   - A worker serves one device with two goroutines: one polls (worker.go), one
//     attends to writes and aging values (attend.go), so that a write never
//     waits for a poll's tick.
//   - The outbox (outbox.go) keeps the latest payload per topic and publishes
//     it when the bus allows: a slow or absent bus never blocks polling.
//
// Locks: worker.mu, then outbox.mu; inbox.mu is a leaf. No I/O happens under any of them.
package driver
